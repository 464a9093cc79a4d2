//! Selection by itself, on the device.

use ultramem::kernels::{from_f32, top_m};

use crate::device::{client, poison};
use crate::top_m::{SIZES, hold};

#[test]
fn every_kind_of_row_is_selected_from() {
    for (seed, (count, keep)) in SIZES.into_iter().enumerate() {
        poison(&client(), 1 << 16);
        hold(&client(), count, keep, seed as u64);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let client = client();
    let scores = from_f32(&client, &[2, 3], &[0.0; 6]).unwrap();
    for (keep, says) in [(0, "top_m"), (4, "top_m 4 exceeds the numbers of a row 3")] {
        let error = top_m(&client, &scores, keep).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let flat = from_f32(&client, &[6], &[0.0; 6]).unwrap();
    assert!(top_m(&client, &flat, 1).map(|_| ()).unwrap_err().to_string().contains("[rows, count]"));
}
