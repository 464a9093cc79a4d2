//! The folder where built kernels and reports of compilers are kept, by the hash of all that they depend on.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// `$XDG_CACHE_HOME/ultramem`, or `~/.cache/ultramem`, or a folder of the system's temporary one.
pub fn root() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|it| !it.is_empty()).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("ultramem")
}

/// The file that holds what was made of `parts`.
pub fn file(parts: &[&str], ending: &str) -> PathBuf {
    let hash = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        (salt, parts).hash(&mut hasher);
        hasher.finish()
    };
    root().join("kernels").join(format!("{:016x}{:016x}.{ending}", hash(0), hash(1)))
}

/// Writes a file that other processes may be reading or writing: in full or not at all.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let draft = draft(path);
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    std::fs::write(&draft, bytes).map_err(Error::io(&draft))?;
    std::fs::rename(&draft, path).map_err(Error::io(path))
}

/// A name beside `path` that nobody else writes to.
pub fn draft(path: &Path) -> PathBuf {
    let unique = format!("{}-{:?}", std::process::id(), std::thread::current().id());
    path.with_extension(unique.replace(['(', ')'], ""))
}
