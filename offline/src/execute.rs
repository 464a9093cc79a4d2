//! Runs a launch: one block after the other, each thread on a fiber that runs until it waits for its warp or its block.

use std::cell::Cell;
use std::ffi::c_void;
use std::sync::Mutex;

use corosensei::{Coroutine, CoroutineResult, Yielder, stack::DefaultStack, stack::Stack};
use memmap2::MmapMut;

use crate::gpu::WARP;
use crate::host::{GUARD, load};
use crate::{Error, Fault, HostBuffer, LaunchReport, Place, Result, Space, Traffic};

/// What a launch is given besides its kernel.
pub struct Launch<'a> {
    pub buffers: &'a [HostBuffer],
    pub info: &'a [u8],
    /// Where in `info` the lengths that are passed by pointer start.
    pub dynamic: usize,
}

/// An entry point and the address of the addresses of its arguments.
type Call = (unsafe extern "C-unwind" fn(*const *const c_void), usize);

/// Where a thread stands. The layout is `um_lane_t`'s.
#[repr(C)]
#[derive(Clone, Copy)]
struct Position {
    thread: [u32; 3],
    block: [u32; 3],
    dim: [u32; 3],
    grid: [u32; 3],
    lane: u32,
}

/// The layout is `um_hooks_t`'s.
#[repr(C)]
struct Hooks {
    access: extern "C" fn(usize, u32, u32, usize),
    block_wait: extern "C" fn(u32),
    exchange: extern "C" fn(u32, u64, u32) -> *const u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Wait {
    Nothing,
    Block(u32),
    Warp(u32, u32),
    Done,
}

struct Lane {
    position: Position,
    wait: Wait,
    yielder: *const Yielder<(), ()>,
    stack: (usize, usize),
    generation: usize,
}

/// A buffer as the kernel sees it, with pages after it in which a stray access does no harm.
struct Bound {
    memory: MmapMut,
    length: usize,
    written: Vec<bool>,
    traffic: Traffic,
}

struct Block {
    lanes: Vec<Lane>,
    current: usize,
    number: usize,
    /// Of each warp, the values that its lanes exchange, twice: a lane may be one exchange ahead of another.
    values: Vec<[[u64; WARP]; 2]>,
    bound: Vec<Bound>,
    shared: (usize, usize),
    shared_written: Vec<bool>,
    image: (usize, usize),
    faults: Vec<Fault>,
    stopped: bool,
}

thread_local! {
    static CURRENT: Cell<*mut Block> = const { Cell::new(std::ptr::null_mut()) };
}

/// Faults that a launch reports at most.
const MOST_FAULTS: usize = 8;
const STACK: usize = 1 << 18;

/// A library has one shared memory, so that one launch runs at a time.
static RUNNING: Mutex<()> = Mutex::new(());

/// Runs the launch and leaves its results in the buffers, its faults and its traffic in the report.
pub fn execute(launch: &Launch<'_>, report: &mut LaunchReport) -> Result<()> {
    let running = RUNNING.lock();
    let kernel = report.kernel.clone();
    let library = load(&kernel)?;
    let failed =
        |error: libloading::Error| Error::Load { path: kernel.entry.clone().into(), reason: error.to_string() };
    // SAFETY: these are the names and types that the headers in `cuda/` define.
    let (entry, lane, hooks, shared, image) = unsafe {
        (
            *library.get::<unsafe extern "C-unwind" fn(*const *const c_void)>(b"um_entry\0").map_err(failed)?,
            *library.get::<*mut *const Position>(b"um_lane\0").map_err(failed)?,
            *library.get::<*mut Hooks>(b"um_hooks\0").map_err(failed)?,
            *library.get::<*mut u8>(b"dynamic_shared_mem\0").map_err(failed)?,
            *library.get::<unsafe extern "C" fn(*mut usize, *mut usize)>(b"um_image\0").map_err(failed)?,
        )
    };
    let mut range = (0, 0);
    // SAFETY: `hooks` is a variable of the library, and `um_image` writes two addresses.
    unsafe {
        hooks.write(Hooks { access, block_wait, exchange });
        image(&mut range.0, &mut range.1);
    }
    let mut block = Block {
        lanes: Vec::new(),
        current: 0,
        number: 0,
        values: Vec::new(),
        bound: launch.buffers.iter().map(bind).collect::<Result<_>>()?,
        shared: (shared as usize, kernel.shared),
        shared_written: Vec::new(),
        image: range,
        faults: Vec::new(),
        stopped: false,
    };
    let dynamic = &launch.info[launch.dynamic.min(launch.info.len())..];
    let pointers: Vec<*const u8> = block.bound.iter().map(|it| it.memory.as_ptr()).collect();
    let dynamic_pointer = dynamic.as_ptr();
    let mut arguments: Vec<*const c_void> = pointers.iter().map(|it| std::ptr::from_ref(it).cast()).collect();
    if !dynamic.is_empty() {
        arguments.push(std::ptr::from_ref(&dynamic_pointer).cast());
        block.image =
            (block.image.0.min(dynamic_pointer as usize), block.image.1.max(dynamic_pointer as usize + dynamic.len()));
    }
    arguments.push(launch.info.as_ptr().cast());
    let arguments = arguments.as_ptr() as usize;
    for number in 0..report.count.iter().map(|&n| n as usize).product() {
        block.run(number, &kernel.dim, &report.count, lane, (entry, arguments));
        if block.stopped {
            break;
        }
    }
    for (bound, buffer) in block.bound.iter().zip(launch.buffers) {
        buffer.replace(&bound.memory[..bound.length], &bound.written);
    }
    report.traffic = block.bound.iter().map(|it| it.traffic).collect();
    report.faults = block.faults;
    report.executed = true;
    drop(running);
    if report.faults.is_empty() {
        return Ok(());
    }
    let faults = report.faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    Err(Error::Faults { kernel: kernel.entry, faults })
}

fn bind(buffer: &HostBuffer) -> Result<Bound> {
    let mut memory = MmapMut::map_anon(buffer.length() + GUARD).map_err(Error::io("memory of a buffer"))?;
    memory[..buffer.length()].copy_from_slice(&buffer.read());
    let traffic = Traffic { length: buffer.length() as u64, ..Traffic::default() };
    Ok(Bound { memory, length: buffer.length(), written: buffer.written(), traffic })
}

fn at(number: usize, dim: &[u32; 3]) -> [u32; 3] {
    let (x, y) = (dim[0] as usize, dim[1] as usize);
    [(number % x) as u32, (number / x % y) as u32, (number / (x * y)) as u32]
}

impl Block {
    fn run(&mut self, number: usize, dim: &[u32; 3], grid: &[u32; 3], shown: *mut *const Position, call: Call) {
        let threads = dim.iter().map(|&n| n as usize).product::<usize>();
        self.number = number;
        self.shared_written = vec![false; self.shared.1];
        self.values = vec![[[0; WARP]; 2]; threads.div_ceil(WARP)];
        self.lanes.clear();
        let mut fibers = Vec::new();
        for thread in 0..threads {
            let stack = DefaultStack::new(STACK).expect("memory for a fiber's stack");
            let place = Position {
                thread: at(thread, dim),
                block: at(number, grid),
                dim: *dim,
                grid: *grid,
                lane: (thread % WARP) as u32,
            };
            let bounds = (stack.limit().get(), stack.base().get());
            self.lanes.push(Lane {
                position: place,
                wait: Wait::Nothing,
                yielder: std::ptr::null(),
                stack: bounds,
                generation: 0,
            });
            fibers.push(Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
                // SAFETY: the block outlives its fibers.
                let block = unsafe { &mut *CURRENT.get() };
                block.lanes[thread].yielder = yielder;
                let (entry, arguments) = call;
                // SAFETY: there are as many arguments as the signature has, and they outlive the launch.
                unsafe { entry(arguments as *const *const c_void) };
            }));
        }
        let this: *mut Self = self;
        CURRENT.set(this);
        while !self.stopped && self.lanes.iter().any(|lane| lane.wait != Wait::Done) {
            for (thread, fiber) in fibers.iter_mut().enumerate() {
                if self.lanes[thread].wait != Wait::Nothing || self.stopped {
                    continue;
                }
                self.current = thread;
                // SAFETY: `shown` is the library's variable; the lane stays where it is while the block runs.
                unsafe { shown.write(&self.lanes[thread].position) };
                if let CoroutineResult::Return(()) = fiber.resume(()) {
                    self.lanes[thread].wait = Wait::Done;
                }
            }
            self.release();
        }
        for mut fiber in fibers {
            if fiber.started() && !fiber.done() {
                // SAFETY: a kernel owns nothing on its stack that would have to be dropped.
                unsafe { fiber.force_reset() };
            }
        }
    }

    fn place(&self, thread: usize) -> Place {
        Place { block: self.number, thread }
    }

    /// Lets go those whose wait is over; stops where nobody can go on.
    fn release(&mut self) {
        let mut free: Vec<usize> = Vec::new();
        for (warp, lanes) in self.lanes.chunks(WARP).enumerate() {
            for (lane, it) in lanes.iter().enumerate() {
                let Wait::Warp(mask, _) = it.wait else { continue };
                let here = |other: usize| mask >> other & 1 == 0 || lanes[other].wait == it.wait;
                if (0..lanes.len()).all(here) {
                    free.push(warp * WARP + lane);
                }
            }
        }
        if free.is_empty() && self.lanes.iter().all(|lane| lane.wait == self.lanes[0].wait) {
            free.extend(0..self.lanes.len());
        }
        if free.is_empty() && self.lanes.iter().any(|lane| lane.wait != Wait::Done) {
            self.diverged();
        }
        for thread in free {
            let wait = &mut self.lanes[thread].wait;
            if *wait != Wait::Done {
                *wait = Wait::Nothing;
            }
        }
    }

    fn diverged(&mut self) {
        let waiting = self.lanes.iter().position(|lane| matches!(lane.wait, Wait::Block(_) | Wait::Warp(..)));
        let Some(thread) = waiting else { return };
        let wait = self.lanes[thread].wait;
        let (Wait::Block(line) | Wait::Warp(_, line)) = wait else { return };
        let other = self.lanes.iter().position(|lane| lane.wait != wait).unwrap_or(thread);
        self.faults.push(Fault::Divergent { place: self.place(thread), line, other: self.place(other) });
        self.stopped = true;
    }

    fn wait(&mut self, wait: Wait) {
        let lane = &mut self.lanes[self.current];
        lane.wait = wait;
        // SAFETY: the yielder lives as long as the fiber that calls this.
        unsafe { (*lane.yielder).suspend(()) };
    }

    fn fault(&mut self, fault: Fault) {
        if self.faults.len() < MOST_FAULTS {
            self.faults.push(fault);
        }
    }

    fn access(&mut self, address: usize, size: usize, store: bool) {
        let lane = &self.lanes[self.current];
        let within = |(first, length): (usize, usize)| address >= first && address - first < length;
        if address >= lane.stack.0 && address < lane.stack.1 {
            return;
        }
        let place = self.place(self.current);
        let regions = || self.bound.iter().map(|it| (it.memory.as_ptr() as usize, it.length));
        let (space, byte) = if let Some((buffer, (first, _))) = regions().enumerate().find(|(_, it)| within(*it)) {
            (Space::Buffer(buffer, address - first), address - first)
        } else if within(self.shared) {
            (Space::Shared(address - self.shared.0), address - self.shared.0)
        } else if address >= self.image.0 && address < self.image.1 && !within((self.shared.0, self.shared.1 + GUARD)) {
            return;
        } else {
            let distances = regions().map(|(first, _)| address.wrapping_sub(first) as i64).enumerate();
            let (buffer, distance) = distances.min_by_key(|(_, distance)| distance.unsigned_abs()).unwrap_or((0, 0));
            self.fault(Fault::OutOfBounds { place, space: Space::Outside(buffer, distance), size, store });
            self.stopped = true;
            return self.wait(Wait::Done);
        };
        let written = match space {
            Space::Buffer(buffer, _) => {
                let bound = &mut self.bound[buffer];
                let flow = if store { &mut bound.traffic.written } else { &mut bound.traffic.read };
                *flow += size as u64;
                &mut bound.written
            }
            _ => &mut self.shared_written,
        };
        let end = (byte + size).min(written.len());
        if store {
            written[byte..end].fill(true);
        } else if written[byte..end].contains(&false) {
            self.fault(Fault::Unwritten { place, space });
        }
    }
}

/// The block that runs on this thread.
fn current() -> &'static mut Block {
    // SAFETY: hooks are called by kernels only, while `Block::run` waits for them.
    unsafe { &mut *CURRENT.get() }
}

extern "C" fn access(address: usize, size: u32, kind: u32, _site: usize) {
    current().access(address, size as usize, kind == 1);
}

extern "C" fn block_wait(line: u32) {
    current().wait(Wait::Block(line));
}

extern "C" fn exchange(mask: u32, value: u64, line: u32) -> *const u64 {
    let block = current();
    let thread = block.current;
    let side = block.lanes[thread].generation % 2;
    block.lanes[thread].generation += 1;
    block.values[thread / WARP][side][thread % WARP] = value;
    block.wait(Wait::Warp(mask, line));
    block.values[thread / WARP][side].as_ptr()
}
