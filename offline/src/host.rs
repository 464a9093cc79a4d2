//! Kernels as libraries of the host: built by `g++` against the headers in `cuda/`, kept in the cache, loaded once.

use std::path::{Path, PathBuf};
use std::process::Command;

use libloading::Library;

use crate::{Error, Kernel, Result, cache};

/// The headers by which a kernel's CUDA C++ is the host's C++.
const HEADERS: [(&str, &str); 6] = [
    ("cuda_runtime.h", include_str!("../cuda/cuda_runtime.h")),
    ("accesses.h", include_str!("../cuda/accesses.h")),
    ("um_float16.h", include_str!("../cuda/um_float16.h")),
    ("cuda_fp16.h", include_str!("../cuda/cuda_fp16.h")),
    ("cuda_bf16.h", include_str!("../cuda/cuda_bf16.h")),
    ("mma.h", include_str!("../cuda/mma.h")),
];
/// Bytes after the shared memory in which a stray access does no harm.
pub const GUARD: usize = 1 << 16;
const OPTIONS: [&str; 9] = [
    "-std=c++20",
    "-O1",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-w",
    "-fPIC",
    "-c",
    "-fsanitize=thread",
];

/// Builds a kernel, or finds it in the cache, and loads it.
pub fn load(kernel: &Kernel) -> Result<Library> {
    let headers: String = HEADERS.iter().map(|(_, text)| *text).collect();
    let path =
        cache::file(&[&kernel.source, &kernel.entry, &kernel.shared.to_string(), &headers, &OPTIONS.concat()], "so");
    if !path.exists() {
        build(kernel, &path)?;
    }
    // SAFETY: the library has no initialisers but `__tsan_init`, which does nothing.
    unsafe { Library::new(&path) }.map_err(|error| Error::Load { path, reason: error.to_string() })
}

fn build(kernel: &Kernel, path: &Path) -> Result<()> {
    let draft = cache::draft(path);
    let (source, object) = (draft.with_extension("cpp"), draft.with_extension("o"));
    let folder: PathBuf = draft.with_extension("include");
    for (name, text) in HEADERS {
        cache::write(&folder.join(name), text.as_bytes())?;
    }
    let call = format!("\nextern \"C\" void um_entry(void **arguments) {{ um_call({}, arguments); }}\n", kernel.entry);
    cache::write(&source, (kernel.source.clone() + &call).as_bytes())?;
    let defines = [format!("-DUM_SHARED={}", kernel.shared), format!("-DUM_GUARD={GUARD}")];
    run(
        kernel,
        Command::new("g++").args(OPTIONS).args(defines).arg("-I").args([&folder, &source]).arg("-o").arg(&object),
    )?;
    run(kernel, Command::new("g++").arg("-shared").arg(&object).arg("-o").arg(&draft))?;
    for file in [&source, &object] {
        std::fs::remove_file(file).map_err(Error::io(file))?;
    }
    std::fs::remove_dir_all(&folder).map_err(Error::io(&folder))?;
    std::fs::rename(&draft, path).map_err(Error::io(path))
}

fn run(kernel: &Kernel, command: &mut Command) -> Result<()> {
    let missing =
        |error: std::io::Error| Error::NoHostCompiler { compiler: "g++".to_string(), reason: error.to_string() };
    let output = command.output().map_err(missing)?;
    if output.status.success() {
        return Ok(());
    }
    let reason =
        String::from_utf8_lossy(&output.stderr).lines().filter(|line| line.contains("error")).take(3).collect();
    Err(Error::Refused { compiler: "g++", kernel: kernel.entry.clone(), reason })
}
