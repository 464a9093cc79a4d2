//! Kernels as libraries of the host: built by `g++` against the headers in `cuda/`, kept in the cache, loaded once.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

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
const OPTIONS: [&str; 12] = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    // A vector is loaded and stored as a whole, as on a GPU, though only parts of it be used.
    "-fno-tree-sra",
    "-fno-ipa-sra",
    "-w",
    "-fPIC",
    "-c",
    "-fsanitize=thread",
];

/// Bytes that follow the shared memory in the library: accesses there are seen as out of bounds.
pub const GUARD: usize = 1 << 16;

/// Where a thread stands. The layout is `um_lane_t`'s.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Position {
    pub thread: [u32; 3],
    pub block: [u32; 3],
    pub dim: [u32; 3],
    pub grid: [u32; 3],
    pub lane: u32,
}

/// What kernels call. The layout is `um_hooks_t`'s.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Hooks {
    pub access: extern "C" fn(usize, u32, u32, usize),
    pub block_wait: extern "C" fn(u32),
    pub exchange: extern "C" fn(u32, u64, u32) -> *const u64,
    pub product: extern "C" fn(),
    pub loop_begins: extern "C" fn(),
}

/// A kernel that is loaded. It has one shared memory and one place that says which thread runs.
pub struct Library {
    path: PathBuf,
    /// Calls the kernel with the addresses of its arguments.
    pub entry: unsafe extern "C-unwind" fn(*const *const c_void),
    lane: *mut *const Position,
    shared: usize,
    image: (usize, usize),
    running: Mutex<()>,
    _library: libloading::Library,
}

// SAFETY: `lane` is a variable of the library, which stays loaded, and is written by who holds `running` alone.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    fn open(path: PathBuf, calls: Hooks) -> Result<Self> {
        let failed = |error: libloading::Error| Error::Load { path: path.clone(), reason: error.to_string() };
        // SAFETY: the library has no initialisers but `__tsan_init`, which does nothing; the names and types are those that
        // the headers in `cuda/` define; `um_image` writes two addresses.
        unsafe {
            let library = libloading::Library::new(&path).map_err(failed)?;
            let image = *library.get::<unsafe extern "C" fn(*mut usize, *mut usize)>(b"um_image\0").map_err(failed)?;
            let hooks = *library.get::<*mut Hooks>(b"um_hooks\0").map_err(failed)?;
            let mut range = (0, 0);
            image(&mut range.0, &mut range.1);
            hooks.write(calls);
            Ok(Self {
                entry: *library
                    .get::<unsafe extern "C-unwind" fn(*const *const c_void)>(b"um_entry\0")
                    .map_err(failed)?,
                lane: *library.get::<*mut *const Position>(b"um_lane\0").map_err(failed)?,
                shared: *library.get::<*mut u8>(b"dynamic_shared_mem\0").map_err(failed)? as usize,
                image: range,
                running: Mutex::new(()),
                _library: library,
                path,
            })
        }
    }

    /// Waits until no launch runs the kernel.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says which thread runs.
    pub fn set_lane(&self, position: *const Position) {
        // SAFETY: `lane` is a variable of the library, and its launch holds the library.
        unsafe { self.lane.write(position) };
    }

    /// Where the shared memory lies.
    pub fn shared(&self) -> usize {
        self.shared
    }

    /// Where the library lies.
    pub fn image(&self) -> (usize, usize) {
        self.image
    }

    /// The line of the source that each return address, counted from the library's start, comes from.
    pub fn lines(&self, sites: impl Iterator<Item = usize>) -> Vec<Option<u32>> {
        let sites: Vec<_> = sites.map(|site| format!("{:#x}", site.saturating_sub(1))).collect();
        if sites.is_empty() {
            return Vec::new();
        }
        let output = Command::new("addr2line").arg("-e").arg(&self.path).args(&sites).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        let line = |text: &str| text.rsplit(':').next()?.split(' ').next()?.parse().ok().filter(|&line| line > 0);
        text.lines().map(line).chain(std::iter::repeat(None)).take(sites.len()).collect()
    }
}

/// Builds a kernel, or finds it in the cache, and loads it.
pub fn load(kernel: &Kernel, hooks: Hooks) -> Result<&'static Library> {
    type Slot = Arc<OnceLock<&'static Library>>;
    static LOADED: Mutex<Option<HashMap<PathBuf, Slot>>> = Mutex::new(None);
    static BUILDING: Mutex<()> = Mutex::new(());
    let headers: String = HEADERS.iter().map(|(_, text)| *text).collect();
    let path =
        cache::file(&[&kernel.source, &kernel.entry, &kernel.shared.to_string(), &headers, &OPTIONS.concat()], "so");
    let slot = {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.get_or_insert_default().entry(path.clone()).or_default().clone()
    };
    if let Some(library) = slot.get() {
        return Ok(library);
    }
    if !path.exists() {
        build(kernel, &path)?;
    }
    let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(library) = slot.get() {
        return Ok(library);
    }
    let library: &'static Library = Box::leak(Box::new(Library::open(path, hooks)?));
    Ok(slot.get_or_init(|| library))
}

fn build(kernel: &Kernel, path: &Path) -> Result<()> {
    // A folder that no other thread or process builds in.
    let folder = cache::draft(path);
    let (source, object, library) = (folder.join("kernel.cpp"), folder.join("kernel.o"), folder.join("kernel.so"));
    for (name, text) in HEADERS {
        cache::write(&folder.join(name), text.as_bytes())?;
    }
    let call = format!("\nextern \"C\" void um_entry(void **arguments) {{ um_call({}, arguments); }}\n", kernel.entry);
    cache::write(&source, (with_loops_counted(&kernel.source) + &call).as_bytes())?;
    let sizes = [format!("-DUM_SHARED={}", kernel.shared.max(1)), format!("-DUM_GUARD={GUARD}")];
    let (mut compile, mut link) = (Command::new("g++"), Command::new("g++"));
    compile.args(OPTIONS).args(sizes).arg("-I").args([&folder, &source]).arg("-o").arg(&object);
    link.arg("-shared").arg(&object).arg("-o").arg(&library);
    let built = run(kernel, &mut compile)
        .and_then(|()| run(kernel, &mut link))
        .and_then(|()| std::fs::rename(&library, path).map_err(Error::io(path)));
    std::fs::remove_dir_all(&folder).map_err(Error::io(&folder))?;
    built
}

/// The source with a call at the head of each loop's body, every line where it was.
fn with_loops_counted(source: &str) -> String {
    let begins = |line: &str| line.ends_with('{') && (line.starts_with("for (") || line.starts_with("while ("));
    let counted =
        |line: &str| if begins(line.trim()) { format!("{} um_loop();", line.trim_end()) } else { line.into() };
    source.lines().map(counted).collect::<Vec<_>>().join("\n")
}

fn run(kernel: &Kernel, command: &mut Command) -> Result<()> {
    let missing =
        |error: std::io::Error| Error::NoHostCompiler { compiler: "g++".to_string(), reason: error.to_string() };
    let output = command.output().map_err(missing)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<_> = text.lines().filter(|line| line.contains("error")).take(3).collect();
    Err(Error::Refused { compiler: "g++", kernel: kernel.entry.clone(), reason: errors.join("; ") })
}
