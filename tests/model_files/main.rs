#![cfg(feature = "files")]
