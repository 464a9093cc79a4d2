//! What ends a verb early: one line for stderr. Also keeps the panics of drivers and runtimes, on whatever thread, from printing
//! anything but that line.

use std::{
    fmt,
    panic::{self, AssertUnwindSafe, PanicHookInfo},
    path::Path,
    sync::{Mutex, PoisonError},
};

use ultramem::Error;

/// Why a verb could not be done.
#[derive(Debug)]
pub struct Failure(String);

/// The command's result.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure with its reason; line breaks in it are not kept.
    pub fn new(reason: impl AsRef<str>) -> Self {
        Self(one_line(reason.as_ref()))
    }

    /// What is wrong with the file at `path`.
    pub fn in_file(path: &Path, error: Error) -> Self {
        match error {
            Error::Io { .. } | Error::Model { .. } => error.into(),
            other => Self::from(other).of_file(path),
        }
    }

    /// The same failure, with the file that it is about.
    pub fn of_file(self, path: &Path) -> Self {
        Self::new(format!("{}: {self}", path.display()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(error.to_string())
    }
}

/// The first panic that nobody has asked for yet.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// From here on a panic prints nothing and is kept for [`guard`].
pub fn keep_panics() {
    panic::set_hook(Box::new(|info| {
        PANIC.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| message(info));
    }));
}

/// Runs `work`; a panic in it, or meanwhile on another thread, is a failure.
pub fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    let panic = PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (panic, result) {
        (Some(reason), _) => Err(Failure::new(format!("the device's runtime failed: {reason}"))),
        (None, Ok(result)) => result,
        (None, Err(_)) => Err(Failure::new("the device's runtime failed")),
    }
}

fn message(info: &PanicHookInfo<'_>) -> String {
    info.payload_as_str().unwrap_or("no reason given").to_string()
}

/// The text without line breaks, without the backtrace that runtimes add to their errors, and not endless.
fn one_line(text: &str) -> String {
    const LONGEST: usize = 400;
    let end = ["backtrace:", "Backtrace:", "BACKTRACE:"].iter().filter_map(|word| text.find(word)).min();
    let text = &text[..end.unwrap_or(text.len())];
    let words: Vec<&str> = text.split_whitespace().collect();
    let line = words.join(" ");
    match line.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_without_a_backtrace() {
        let failure = Failure::new("it\n  broke { backtrace: 0: main\n 1: start }");
        assert_eq!(failure.to_string(), "it broke {");
        assert_eq!(Failure::new("x".repeat(1000)).to_string().chars().count(), 401);
    }
}
