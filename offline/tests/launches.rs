//! 100,000 random calls of the kernels' launches on an offline device that drops what it is given: each gives what it documents or an error.

#[path = "../../tests/common/draw.rs"]
mod draw;
#[path = "../../tests/common/launches.rs"]
mod launches;
#[path = "../../versus/tests/common/launches.rs"]
mod versus;

use std::collections::BTreeMap;
use std::sync::Mutex;

use cubecl::{Runtime, future::block_on};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use ultramem_offline::{Execution, OfflineDevice, OfflineRuntime, Options};

#[test]
fn every_launch_is_right_or_an_error() {
    let open =
        || OfflineRuntime::client(&OfflineDevice::new(Options { execution: Execution::Dropped, ..Options::default() }));
    let (client, other) = (open(), open());
    let calls: Mutex<BTreeMap<&str, [u32; 2]>> = Mutex::default();
    let config = ProptestConfig { cases: 100_000, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config)
        .run(&any::<u64>(), |seed| {
            let call = if seed % 7 == 0 { versus::call } else { launches::call };
            let (name, accepted) = call(&client, &other, seed);
            calls.lock().unwrap().entry(name).or_default()[usize::from(accepted)] += 1;
            block_on(client.sync()).map_err(|error| TestCaseError::fail(format!("{name}: {error:?}")))
        })
        .unwrap();
    for (name, [refused, accepted]) in calls.into_inner().unwrap() {
        assert!(refused > 0 && accepted > 0, "{name}: {accepted} calls accepted, {refused} refused");
    }
}
