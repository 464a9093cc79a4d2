//! Files mapped, and short ones read.

use std::{fs::File, io::Read, path::Path};

use memmap2::Mmap;

use crate::{Error, Result};

/// The file at `path`, mapped. Whoever calls this tells its own caller not to change the file while the map lives.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let io = |source| Error::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: the map is read-only, and every bit pattern is a valid byte. What can't be ruled out from here is that
    // someone changes the file while it is mapped: cut short, reading it raises SIGBUS; written over in place, reads
    // may see either content. The caller is told to prevent that. Nothing relies on reading the same content twice:
    // headers and every index are copied out and checked as copies.
    unsafe { Mmap::map(&file) }.map_err(io)
}

/// The text of the file at `path`, which has at most `longest` bytes.
pub(super) fn text(path: &Path, longest: u64) -> Result<String> {
    let io = |source| Error::Io { path: path.into(), source };
    let mut text = String::new();
    File::open(path).map_err(io)?.take(longest + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > longest {
        return Err(problem(path, format!("has more than the {longest} bytes allowed for such a file")));
    }
    Ok(text)
}

/// The error for a file that can't be used.
pub(super) fn problem(path: &Path, problem: impl Into<String>) -> Error {
    Error::Model { path: path.into(), problem: problem.into() }
}

/// Text that a file holds, for a message: quoted, escaped, and cut if it is long.
pub(super) fn shown(text: &str) -> String {
    const LONGEST: usize = 100;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}
