//! Compiles a kernel as it would be compiled where it runs, without a GPU: NVRTC makes PTX of the source, `ptxas` makes machine
//! code of the PTX and says what a thread of it needs. What both said is kept by the hash of the source.
//!
//! The tools are NVIDIA's packages on PyPI, in `cuda-tools` of the cache; where they are missing, the error is the line that
//! installs them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::Library;
use serde::{Deserialize, Serialize};

use crate::{Error, Gpu, Kernel, Result, cache};

/// What machine code is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Architecture {
    /// A100.
    Sm80,
    /// RTX 4090.
    Sm89,
    /// H100 and H200, with what later ones don't have.
    Sm90a,
    /// B200.
    Sm100,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Sm80, Self::Sm89, Self::Sm90a, Self::Sm100];

    /// The architecture of a GPU.
    pub fn of(gpu: Gpu) -> Self {
        match gpu {
            Gpu::A100 => Self::Sm80,
            Gpu::Rtx4090 => Self::Sm89,
            Gpu::H100 | Gpu::H200 => Self::Sm90a,
            Gpu::B200 => Self::Sm100,
        }
    }

    /// A GPU of this architecture.
    pub fn gpu(self) -> Gpu {
        match self {
            Self::Sm80 => Gpu::A100,
            Self::Sm89 => Gpu::Rtx4090,
            Self::Sm90a => Gpu::H100,
            Self::Sm100 => Gpu::B200,
        }
    }

    /// What follows `sm_` and `compute_`.
    fn number(self) -> &'static str {
        match self {
            Self::Sm80 => "80",
            Self::Sm89 => "89",
            Self::Sm90a => "90a",
            Self::Sm100 => "100",
        }
    }
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sm_{}", self.number())
    }
}

/// What a kernel's machine code needs, as `ptxas` says, and how wide its loads are, as its PTX says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// 32-bit registers of a thread.
    pub registers: usize,
    /// Bytes of a thread's stack, which lies in device memory.
    pub stack: usize,
    /// Bytes that a thread stores because registers ran out.
    pub spill_stores: usize,
    /// Bytes that a thread loads back.
    pub spill_loads: usize,
    /// Bytes of shared memory that the code names itself, besides what the launch asks for.
    pub shared: usize,
    /// Of each buffer that is loaded from, the widths of the loads in bytes.
    pub loads: BTreeMap<usize, BTreeSet<usize>>,
}

/// A kernel for an architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// NVIDIA's portable assembly.
    pub ptx: String,
    /// What it needs.
    pub resources: Resources,
}

/// Compiles a kernel for an architecture, or finds it in the cache.
///
/// # Errors
/// Tools that are not installed, and what a compiler refuses.
pub fn compile(kernel: &Kernel, architecture: Architecture) -> Result<Compiled> {
    let ptx = ptx(kernel, architecture, false)?;
    let file = cache::file(&[&ptx, &kernel.entry, architecture.number(), REQUIREMENTS, FORMAT], "json");
    let known = std::fs::read_to_string(&file).ok().and_then(|text| serde_json::from_str(&text).ok());
    if let Some(resources) = known {
        return Ok(Compiled { ptx, resources });
    }
    let mut resources = Tools::get()?.resources(kernel, &ptx, architecture)?;
    resources.loads = loads(&ptx);
    cache::write(&file, serde_json::to_string(&resources).unwrap_or_default().as_bytes())?;
    Ok(Compiled { ptx, resources })
}

/// The PTX of a kernel, as NVRTC makes it or as the cache has it. Where `rolled`, loops are left as they are written.
///
/// # Errors
/// NVRTC that is not installed, and what it refuses.
pub fn ptx(kernel: &Kernel, architecture: Architecture, rolled: bool) -> Result<String> {
    let source = if rolled { &rolled_loops(&kernel.source) } else { &kernel.source };
    let file = cache::file(&[source, &kernel.entry, architecture.number(), REQUIREMENTS, FORMAT], "ptx");
    if let Ok(ptx) = std::fs::read_to_string(&file) {
        return Ok(ptx);
    }
    let ptx = Tools::get()?.ptx(source, kernel, architecture)?;
    cache::write(&file, ptx.as_bytes())?;
    Ok(ptx)
}

/// The machine code of a kernel as `nvdisasm -g` lists it: instructions, and the line of the source before those that come of it.
///
/// # Errors
/// Tools that are not installed, and what they refuse.
pub fn machine_code(kernel: &Kernel, architecture: Architecture) -> Result<String> {
    let ptx = ptx(kernel, architecture, false)?;
    let file = cache::file(&[&ptx, architecture.number(), REQUIREMENTS, FORMAT], "sass");
    if let Ok(listing) = std::fs::read_to_string(&file) {
        return Ok(listing);
    }
    let listing = Tools::get()?.listing(kernel, &ptx, architecture)?;
    cache::write(&file, listing.as_bytes())?;
    Ok(listing)
}

/// The source with loops that are not to be unrolled, every line where it was.
fn rolled_loops(source: &str) -> String {
    let begins = |line: &str| line.ends_with('{') && (line.starts_with("for (") || line.starts_with("while ("));
    let rolled = |line: &str| if begins(line.trim()) { format!("_Pragma(\"unroll 1\") {line}") } else { line.into() };
    source.lines().map(rolled).collect::<Vec<_>>().join("\n")
}

/// [`compile`] for every pair, on all cores, in their order.
///
/// # Errors
/// The first that fails.
pub fn compile_all(kernels: &[(&Kernel, Architecture)]) -> Result<Vec<Compiled>> {
    let next = AtomicUsize::new(0);
    let done: Vec<OnceLock<Result<Compiled>>> = kernels.iter().map(|_| OnceLock::new()).collect();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(((kernel, architecture), done)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| kernels.get(at).zip(done.get(at)))
                {
                    // Nobody else has this place.
                    let _ = done.set(compile(kernel, *architecture));
                }
            });
        }
    });
    done.into_iter().filter_map(OnceLock::into_inner).collect()
}

/// The packages.
const REQUIREMENTS: &str = include_str!("../cuda/requirements.txt");
/// Changes when what is kept in the cache does.
const FORMAT: &str = "1";

/// Where the packages lie.
pub fn folder() -> PathBuf {
    cache::root().join("cuda-tools")
}

/// The line that installs the packages.
pub fn install_line() -> String {
    let packages: Vec<&str> = REQUIREMENTS.lines().collect();
    format!("python3 -m pip install --no-deps --target {} {}", folder().display(), packages.join(" "))
}

/// NVRTC, loaded, and where the rest is.
struct Tools {
    nvrtc: Library,
    includes: [PathBuf; 2],
    ptxas: PathBuf,
    nvdisasm: PathBuf,
}

type Program = *mut c_void;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

impl Tools {
    /// The tools, loaded once. What is missing may be installed meanwhile, so it is looked for each time.
    fn get() -> Result<&'static Self> {
        static TOOLS: Mutex<Option<&'static Tools>> = Mutex::new(None);
        let mut tools = TOOLS.lock().unwrap_or_else(PoisonError::into_inner);
        match *tools {
            Some(tools) => Ok(tools),
            None => Ok(tools.insert(Box::leak(Box::new(Self::load()?)))),
        }
    }

    fn load() -> Result<Self> {
        let packages = folder().join("nvidia");
        let present = |path: PathBuf| {
            let missing = || Error::NoCudaTools { missing: path.clone(), install: install_line() };
            if path.exists() { Ok(path) } else { Err(missing()) }
        };
        let library = present(packages.join("cuda_nvrtc/lib/libnvrtc.so.12"))?;
        let includes = [present(packages.join("cuda_runtime/include"))?, present(packages.join("cuda_nvcc/include"))?];
        let ptxas = present(packages.join("cuda_nvcc/bin/ptxas"))?;
        let nvdisasm = present(packages.join("cu13/bin/nvdisasm"))?;
        // SAFETY: the initialisers of NVIDIA's library need nothing of this process.
        let nvrtc = unsafe { Library::new(&library) }
            .map_err(|error| Error::Load { path: library, reason: error.to_string() })?;
        Ok(Self { nvrtc, includes, ptxas, nvdisasm })
    }

    fn ptx(&self, source: &str, kernel: &Kernel, architecture: Architecture) -> Result<String> {
        let refused = |reason: String| Error::Refused { compiler: "NVRTC", kernel: kernel.entry.clone(), reason };
        let source = CString::new(source).map_err(|error| refused(error.to_string()))?;
        // PTX is the same whether machine code was asked for or not, and sooner had.
        let mut options = vec![format!("--gpu-architecture=compute_{}", architecture.number())];
        options.extend(self.includes.iter().map(|it| format!("--include-path={}", it.display())));
        options.push("-lineinfo".to_string());
        let options: Vec<CString> = options.into_iter().filter_map(|option| CString::new(option).ok()).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: these are the signatures in nvrtc.h; every string outlives the program, which is destroyed once, last.
        unsafe {
            let create: unsafe extern "C" fn(
                *mut Program,
                *const c_char,
                *const c_char,
                c_int,
                *const *const c_char,
                *const *const c_char,
            ) -> c_int = self.symbol(b"nvrtcCreateProgram\0")?;
            let compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int =
                self.symbol(b"nvrtcCompileProgram\0")?;
            let destroy: unsafe extern "C" fn(*mut Program) -> c_int = self.symbol(b"nvrtcDestroyProgram\0")?;
            let mut program: Program = std::ptr::null_mut();
            let none = std::ptr::null();
            let status = create(&mut program, source.as_ptr(), none, 0, std::ptr::null(), std::ptr::null());
            if status != 0 {
                return Err(refused(format!("nvrtcCreateProgram returns {status}")));
            }
            let status = compile(program, pointers.len() as c_int, pointers.as_ptr());
            let text = match status {
                0 => self.text(program, b"nvrtcGetPTXSize\0", b"nvrtcGetPTX\0"),
                _ => self.text(program, b"nvrtcGetProgramLogSize\0", b"nvrtcGetProgramLog\0"),
            };
            destroy(&mut program);
            if status == 0 { text } else { Err(refused(first_errors(&text?))) }
        }
    }

    /// # Safety
    /// `T` is the function's signature.
    unsafe fn symbol<T: Copy>(&self, name: &[u8]) -> Result<T> {
        let failed = |error: libloading::Error| Error::Load { path: "NVRTC".into(), reason: error.to_string() };
        // SAFETY: as the caller promises.
        unsafe { self.nvrtc.get::<T>(name) }.map(|symbol| *symbol).map_err(failed)
    }

    /// # Safety
    /// `size` and `text` name a pair of NVRTC's functions that give a text of `program`.
    unsafe fn text(&self, program: Program, size: &[u8], text: &[u8]) -> Result<String> {
        // SAFETY: the second function writes as many bytes as the first one says.
        unsafe {
            let (size, text): (Size, Text) = (self.symbol(size)?, self.symbol(text)?);
            let mut length = 0;
            size(program, &mut length);
            let mut bytes = vec![0u8; length];
            text(program, bytes.as_mut_ptr().cast());
            bytes.pop();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
    }

    fn resources(&self, kernel: &Kernel, ptx: &str, architecture: Architecture) -> Result<Resources> {
        let said = self.with_file(ptx, |file| self.assemble(kernel, file, Path::new("/dev/null"), architecture))?;
        Ok(parse_resources(&said))
    }

    fn listing(&self, kernel: &Kernel, ptx: &str, architecture: Architecture) -> Result<String> {
        self.with_file(ptx, |file| {
            // Another thread may be at the same kernel: the file's ending is its own.
            let code = PathBuf::from(format!("{}.cubin", file.display()));
            self.assemble(kernel, file, &code, architecture)?;
            let mut command = Command::new(&self.nvdisasm);
            let output = command.args(["-g", "-c"]).arg(&code).output().map_err(Error::io(&self.nvdisasm))?;
            std::fs::remove_file(&code).map_err(Error::io(&code))?;
            let said = String::from_utf8_lossy(&output.stderr);
            succeeded("nvdisasm", kernel, output.status, &said)?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        })
    }

    /// Has `use_it` work on a file that holds the PTX.
    fn with_file<T>(&self, ptx: &str, use_it: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let file = cache::draft(&cache::file(&[ptx], "ptx"));
        cache::write(&file, ptx.as_bytes())?;
        let found = use_it(&file);
        std::fs::remove_file(&file).map_err(Error::io(&file))?;
        found
    }

    /// Makes machine code of a file; what `ptxas` says of it.
    fn assemble(&self, kernel: &Kernel, file: &Path, code: &Path, architecture: Architecture) -> Result<String> {
        let output = Command::new(&self.ptxas)
            .args(["-v", "-lineinfo", "--gpu-name", &architecture.to_string(), "-o"])
            .args([code, file])
            .stdin(Stdio::null())
            .output()
            .map_err(Error::io(&self.ptxas))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        succeeded("ptxas", kernel, output.status, &said)?;
        Ok(said)
    }
}

fn succeeded(compiler: &'static str, kernel: &Kernel, status: std::process::ExitStatus, said: &str) -> Result<()> {
    match status.success() {
        true => Ok(()),
        false => Err(Error::Refused { compiler, kernel: kernel.entry.clone(), reason: first_errors(said) }),
    }
}

/// The first lines that speak of an error, or the first lines.
fn first_errors(text: &str) -> String {
    let lines = || text.lines().filter(|line| !line.trim().is_empty());
    let errors: Vec<&str> = lines().filter(|line| line.contains("error") || line.contains("fatal")).take(3).collect();
    if errors.is_empty() { lines().take(3).collect::<Vec<_>>().join("; ") } else { errors.join("; ") }
}

/// The numbers in what `ptxas -v` says: each stands before the words that name it.
fn parse_resources(said: &str) -> Resources {
    let before = |words: &str| {
        said.split(words).next().filter(|head| head.len() < said.len()).and_then(|head| {
            let digits = head.trim_end().rsplit(|c: char| !c.is_ascii_digit()).next()?;
            digits.parse().ok()
        })
    };
    let number = |words| before(words).unwrap_or(0);
    Resources {
        registers: number(" registers"),
        stack: number(" bytes stack frame"),
        spill_stores: number(" bytes spill stores"),
        spill_loads: number(" bytes spill loads"),
        shared: number(" bytes smem"),
        loads: BTreeMap::new(),
    }
}

/// The widths of the loads from each buffer: which addresses come of which parameter is followed through the registers.
fn loads(ptx: &str) -> BTreeMap<usize, BTreeSet<usize>> {
    let instructions: Vec<Instruction<'_>> = ptx.lines().filter_map(Instruction::parse).collect();
    let mut origins: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    loop {
        let mut changed = false;
        for instruction in &instructions {
            let Some(target) = instruction.address_target() else { continue };
            let found: BTreeSet<usize> = match instruction.parameter() {
                Some(parameter) => BTreeSet::from([parameter]),
                None => instruction.sources().filter_map(|source| origins.get(source)).flatten().copied().collect(),
            };
            let known = origins.entry(target).or_default();
            let before = known.len();
            known.extend(found);
            changed |= known.len() > before;
        }
        if !changed {
            break;
        }
    }
    let mut loads: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    for (instruction, width) in instructions.iter().filter_map(|it| Some((it, it.load_width()?))) {
        for buffer in instruction.sources().filter_map(|source| origins.get(source)).flatten() {
            loads.entry(*buffer).or_default().insert(width);
        }
    }
    loads
}

/// One instruction of PTX: `@predicate opcode target, sources;`.
struct Instruction<'a> {
    opcode: &'a str,
    operands: &'a str,
}

impl<'a> Instruction<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let line = line.split("//").next()?.trim().strip_suffix(';')?;
        let line = if line.starts_with('@') { line.split_once(' ')?.1.trim() } else { line };
        let (opcode, operands) = line.split_once(char::is_whitespace)?;
        (!opcode.starts_with('.')).then_some(Self { opcode, operands })
    }

    /// The 64-bit register that is written, unless it comes from memory.
    fn address_target(&self) -> Option<&'a str> {
        let from_memory = self.opcode.starts_with("ld.") && !self.opcode.starts_with("ld.param");
        let target = self.operands.split(',').next()?.trim();
        (!from_memory && target.starts_with("%rd")).then_some(target)
    }

    /// The number of the kernel's parameter that is read.
    fn parameter(&self) -> Option<usize> {
        let name =
            self.opcode.strip_prefix("ld.param").and(self.operands.split_once('[')?.1.split(['+', ']']).next())?;
        name.rsplit_once("_param_")?.1.parse().ok()
    }

    /// The 64-bit registers that are read.
    fn sources(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let sources = self.operands.split_once(',').map_or("", |(_, sources)| sources);
        sources.split([',', ' ', '[', ']', '+', '{', '}', '\t']).filter(|word| word.starts_with("%rd"))
    }

    /// Bytes of a load from device memory.
    fn load_width(&self) -> Option<usize> {
        let parts: Vec<&str> = self.opcode.split('.').collect();
        let elsewhere = ["param", "shared", "local", "const"].iter().any(|space| parts.contains(space));
        if parts[0] != "ld" || elsewhere {
            return None;
        }
        let bits: usize = parts.last()?.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().ok()?;
        let vector = parts.iter().find_map(|part| part.strip_prefix('v')?.parse().ok()).unwrap_or(1);
        Some(bits / 8 * vector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_ptxas() {
        let said = "ptxas info    : Function properties for k\n    48 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n\
                    ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]\n";
        let found = parse_resources(said);
        let expected = Resources {
            registers: 40,
            stack: 48,
            spill_stores: 12,
            spill_loads: 16,
            shared: 1024,
            loads: BTreeMap::new(),
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn loads_are_told_apart_by_their_buffer() {
        let ptx = "
            ld.param.u64 \t%rd1, [k_param_0];
            ld.param.u64 \t%rd2, [k_param_3];
            ld.param.u32 \t%r1, [k_param_4+4];
            cvta.to.global.u64 \t%rd3, %rd2;
            mul.wide.u32 \t%rd5, %r1, 16;
            add.s64 \t%rd6, %rd3, %rd5;
            @%p1 ld.global.nc.v4.u32 \t{%r2, %r3, %r4, %r5}, [%rd6];
            ld.global.nc.u16 \t%rs1, [%rd6+16];
            ld.global.u64 \t%rd7, [%rd1];
            add.s64 \t%rd8, %rd7, %rd5;
            st.global.v4.u32 \t[%rd1], {%r2, %r3, %r4, %r5};
            ld.shared.f32 \t%f1, [%rd6];";
        let expected = BTreeMap::from([(0, BTreeSet::from([8])), (3, BTreeSet::from([2, 16]))]);
        assert_eq!(loads(ptx), expected);
    }
}
