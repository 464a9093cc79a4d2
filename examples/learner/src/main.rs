//! `learner FOLDER [EPOCH]` trains, with metrics and checkpoints in the folder. With the number of an epoch it goes on after that epoch's
//! checkpoint, and finds what it would have found without the stop.

use std::{error::Error, path::Path};

use ultramem_learner::{EPOCHS, Model, train};

/// Trains in the folder that is named.
pub fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: learner FOLDER [EPOCH]")?;
    let resume = arguments.next().map(|epoch| epoch.parse()).transpose()?;
    train(Model::new(&Default::default())?, Path::new(&folder), EPOCHS, resume)?;
    Ok(())
}
