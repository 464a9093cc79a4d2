//! Files that hold a layer and hidden states.

use std::{fs::File, io::Read, path::Path};

use indicatif::{ProgressBar, ProgressStyle};
use ultramem::{Checkpoint, Error, HostTensor};

use crate::failure::{Failure, Result};

/// The checkpoint at `path`. A large file is read through once, with a progress bar on a terminal, so that it is in memory
/// when it is used.
pub fn checkpoint(path: &Path) -> Result<Checkpoint> {
    if path.is_dir() {
        return Err(Failure::new(format!("{}: is a directory, expected a safetensors file", path.display())));
    }
    let checkpoint = Checkpoint::open(path).map_err(|error| Failure::in_file(path, error))?;
    read_through(path)?;
    Ok(checkpoint)
}

/// Reads a large file through, with a progress bar on a terminal.
pub fn read_through(path: &Path) -> Result<()> {
    read(path).map_err(|source| Error::Io { path: path.into(), source }.into())
}

fn read(path: &Path) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let bar = ProgressBar::new(length);
    if length < LARGE || bar.is_hidden() {
        return Ok(());
    }
    if let Ok(style) = ProgressStyle::with_template("reading {wide_bar} {bytes} of {total_bytes} {eta}") {
        bar.set_style(style);
    }
    let mut part = vec![0; PART];
    loop {
        match file.read(&mut part)? {
            0 => break,
            read => bar.inc(read as u64),
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// Bytes from which a file takes long enough to read that one wants to see it.
const LARGE: u64 = 256 << 20;
const PART: usize = 8 << 20;

/// Refuses to write results over the file that they come from, by whatever name it is called.
pub fn differs(input: &Path, output: &Path) -> Result<()> {
    let same = match (input.canonicalize(), output.canonicalize()) {
        (Ok(input), Ok(output)) => input == output || is_same_file(&input, &output),
        _ => false,
    };
    if same {
        return Err(Failure::new(format!("{}: the output would replace the input", output.display())));
    }
    Ok(())
}

/// Whether two names are hard links of one file.
#[cfg(unix)]
fn is_same_file(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let of = |path: &Path| path.metadata().ok().map(|it| (it.dev(), it.ino()));
    of(one).is_some_and(|one| of(other) == Some(one))
}

#[cfg(not(unix))]
fn is_same_file(_: &Path, _: &Path) -> bool {
    false
}

/// The tensor `input` `[tokens, hidden_size]`; there may be no tokens.
pub fn input(path: &Path, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
    hidden_states(checkpoint, "input", None).map_err(|failure| failure.of_file(path))
}

/// The tensor `grad_output`, as many tokens as the input has.
pub fn grad_output(path: &Path, checkpoint: &Checkpoint, tokens: usize) -> Result<Vec<f32>> {
    hidden_states(checkpoint, "grad_output", Some(tokens)).map_err(|failure| failure.of_file(path))
}

/// The tensor `name` `[tokens, hidden_size]`.
pub fn hidden_states(checkpoint: &Checkpoint, name: &str, tokens: Option<usize>) -> Result<Vec<f32>> {
    shaped(&checkpoint.tensor(name)?, name, checkpoint.config().hidden_size, tokens)
}

/// The numbers of a tensor `[tokens, hidden_size]` that is called `name`.
pub fn shaped(tensor: &HostTensor<'_>, name: &str, hidden_size: usize, tokens: Option<usize>) -> Result<Vec<f32>> {
    match *tensor.shape() {
        [found, width] if width == hidden_size && tokens.is_none_or(|tokens| found == tokens) => Ok(tensor.to_f32()),
        ref shape => {
            let expected = match tokens {
                Some(tokens) => format!("[{tokens}, {hidden_size}]"),
                None => format!("[tokens, {hidden_size}]"),
            };
            Err(Failure::new(format!("tensor {name:?} has shape {shape:?}, expected {expected}")))
        }
    }
}
