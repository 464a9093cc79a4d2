//! Random calls of the kernels' launches that run: each gives what it documents or an error.

#[path = "../common/launches.rs"]
mod calls;
#[path = "../../../tests/common/draw.rs"]
mod draw;

use cubecl::future::block_on;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::device::{client, other_client};

#[test]
fn every_launch_is_right_or_an_error() {
    let (client, other) = (client(), other_client());
    let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config)
        .run(&any::<u64>(), |seed| {
            let (name, _) = calls::call(&client, &other, seed);
            block_on(client.sync()).map_err(|error| TestCaseError::fail(format!("{name}: {error:?}")))
        })
        .unwrap();
}
