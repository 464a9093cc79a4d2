//! Runs a launch: one block after the other, each thread on a fiber that runs until it waits for its warp or its block.
//!
//! Blocks, warps and the lanes of a warp run in an order that is drawn anew for each launch: what depends on it is a fault of
//! the kernel.

use std::cell::Cell;
use std::ffi::c_void;

use corosensei::{Coroutine, CoroutineResult, Yielder, stack::DefaultStack, stack::Stack};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::gpu::WARP;
use crate::host::{GUARD, Hooks, Library, Position, load};
use crate::report::{Fault, Finding, Place};
use crate::watch::{Access, Stamp, Times, Watch};
use crate::{Error, HostBuffer, LaunchReport, Result};

/// What a launch is given besides its kernel.
pub struct Launch<'a> {
    pub buffers: &'a [HostBuffer],
    /// Scalars and lengths: those that are passed by value, then those that are passed by pointer.
    pub info: &'a [u64],
    /// Where in `info` the latter start.
    pub dynamic: usize,
}

/// An entry point and its arguments, an address each.
#[derive(Clone, Copy)]
struct Call {
    entry: unsafe extern "C-unwind" fn(*const *const c_void),
    arguments: *const *const c_void,
}

/// What kernels call here.
const HOOKS: Hooks = Hooks { access, block_wait, exchange, product, loop_begins };

#[derive(Clone, Copy, PartialEq)]
enum Wait {
    Nothing,
    /// For the block, in a line of the source.
    Block(u32),
    /// For the lanes of a mask, in a line.
    Warp(u32, u32),
    Done,
}

struct Lane {
    position: Position,
    wait: Wait,
    yielder: *const Yielder<(), ()>,
    /// First and last byte of the fiber's stack.
    stack: (usize, usize),
    /// What it gives to an exchange, and what it gets.
    given: u64,
    values: [u64; WARP],
    times: Times,
    /// Loop iterations.
    loops: u64,
}

/// The block that runs.
struct Block {
    number: usize,
    lanes: Vec<Lane>,
    current: usize,
    watch: Watch,
    /// Barriers of blocks since the launch began, and of each warp since the block did.
    epoch: u32,
    steps: Vec<u32>,
    /// The library, and what of the arguments is none of the buffers.
    image: (usize, usize),
    quiet: (usize, usize),
    /// The shared memory and the guard behind it.
    shared: (usize, usize),
    /// Faults, and the address in the library of each; of a barrier, 0.
    faults: Vec<(usize, Fault)>,
    products: u64,
    /// Loop iterations of the thread that went through most, of the blocks that are done.
    loops: u64,
    stopped: bool,
    random: StdRng,
}

thread_local! {
    static CURRENT: Cell<*mut Block> = const { Cell::new(std::ptr::null_mut()) };
}

/// Faults that a launch reports at most.
const MOST_FAULTS: usize = 16;
const STACK: usize = 1 << 18;

type Fiber = Coroutine<(), (), (), DefaultStack>;

/// Runs the launch and leaves its results in the buffers, its faults and its traffic in the report.
pub fn execute(launch: &Launch<'_>, report: &mut LaunchReport) -> Result<()> {
    let kernel = report.kernel.clone();
    let library = load(&kernel, HOOKS)?;
    let hold = library.hold();
    let (threads, image) = (kernel.dim.iter().map(|&n| n as usize).product::<usize>(), library.image());

    // Two arguments may share a page, which is locked once.
    let mut ids: Vec<usize> = launch.buffers.iter().map(HostBuffer::page_id).collect();
    let of_buffer = ids.clone();
    ids.sort_unstable();
    ids.dedup();
    let owner = |id: &usize| &launch.buffers[of_buffer.iter().position(|it| it == id).expect("an argument's page")];
    let mut pages: Vec<_> = ids.iter().map(|id| owner(id).page()).collect();
    let marks = pages.iter_mut().map(|page| std::mem::take(&mut page.written)).collect();
    let place = |buffer: &HostBuffer| ids.binary_search(&buffer.page_id()).expect("a locked page");
    let starts: Vec<usize> =
        launch.buffers.iter().map(|it| pages[place(it)].memory.as_mut_ptr() as usize + it.offset()).collect();
    let regions = launch.buffers.iter().zip(&starts).zip(&kernel.buffers);
    let regions = regions.map(|((it, &start), a)| (it.clone(), place(it), start, a.writable, a.size));

    let dynamic = &launch.info[launch.dynamic.min(launch.info.len())..];
    let dynamic_start = dynamic.as_ptr();
    let mut arguments: Vec<*const c_void> = starts.iter().map(|start| std::ptr::from_ref(start).cast()).collect();
    if !dynamic.is_empty() {
        arguments.push(std::ptr::from_ref(&dynamic_start).cast());
    }
    arguments.push(launch.info.as_ptr().cast());
    let call = Call { entry: library.entry, arguments: arguments.as_ptr() };

    let mut block = Block {
        number: 0,
        lanes: Vec::new(),
        current: 0,
        watch: Watch::new(regions, marks, (library.shared(), kernel.shared), threads, image.1 - image.0),
        epoch: 0,
        steps: Vec::new(),
        image,
        shared: (library.shared(), library.shared() + kernel.shared + GUARD),
        quiet: (dynamic_start as usize, dynamic_start as usize + size_of_val(dynamic)),
        faults: Vec::new(),
        products: 0,
        loops: 0,
        stopped: false,
        random: StdRng::seed_from_u64(report.seed),
    };
    let mut numbers: Vec<usize> = (0..report.count.iter().map(|&n| n as usize).product()).collect();
    numbers.shuffle(&mut block.random);
    let mut stacks = Vec::new();
    for number in numbers {
        run(&mut block, number, (&kernel.dim, &report.count), library, call, &mut stacks);
        if block.stopped {
            break;
        }
    }
    report.traffic = block.watch.traffic();
    report.gaps = if block.stopped { Vec::new() } else { block.watch.gaps() };
    report.products = block.products;
    report.loops = block.loops;
    report.executed = true;
    let lines = library.lines(block.faults.iter().map(|(site, _)| *site));
    let faults = block.faults.iter().zip(lines);
    report.faults = faults.map(|((_, fault), line)| Fault { line: fault.line.or(line), ..*fault }).collect();
    for (page, marks) in pages.iter_mut().zip(block.watch.into_marks()) {
        page.written = marks;
    }
    drop(hold);
    if report.faults.is_empty() {
        return Ok(());
    }
    let faults = report.faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    Err(Error::Faults { kernel: report.kernel.entry.clone(), seed: report.seed, faults })
}

fn at(number: usize, dim: &[u32; 3]) -> [u32; 3] {
    let (x, y) = (dim[0] as usize, dim[1] as usize);
    [(number % x) as u32, (number / x % y) as u32, (number / (x * y)) as u32]
}

/// Runs one block to its end, or to the fault that stops the launch.
fn run(
    block: &mut Block,
    number: usize,
    (dim, grid): (&[u32; 3], &[u32; 3]),
    library: &Library,
    call: Call,
    stacks: &mut Vec<DefaultStack>,
) {
    let threads = dim.iter().map(|&n| n as usize).product::<usize>();
    block.begin(number, threads);
    let mut fibers: Vec<Fiber> = Vec::new();
    for thread in 0..threads {
        let stack = stacks.pop().unwrap_or_else(|| DefaultStack::new(STACK).expect("memory for a fiber's stack"));
        let (thread_at, block_at) = (at(thread, dim), at(number, grid));
        let lane = (thread % WARP) as u32;
        block.lanes.push(Lane {
            position: Position { thread: thread_at, block: block_at, dim: *dim, grid: *grid, lane },
            wait: Wait::Nothing,
            yielder: std::ptr::null(),
            stack: (stack.limit().get(), stack.base().get()),
            given: 0,
            values: [0; WARP],
            times: Vec::new(),
            loops: 0,
        });
        fibers.push(Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            current(|block| block.lanes[thread].yielder = yielder);
            let Call { entry, arguments } = { call };
            // SAFETY: there are as many arguments as the signature has, and they outlive the launch.
            unsafe { entry(arguments) };
        }));
    }
    let mut warps: Vec<usize> = (0..threads.div_ceil(WARP)).collect();
    // From here on the fibers reach the block through `CURRENT`, and nothing else holds on to it while one runs.
    CURRENT.set(block);
    loop {
        current(|block| warps.shuffle(&mut block.random));
        for &warp in &warps {
            run_warp(warp, &mut fibers, library);
        }
        if current(Block::release) {
            break;
        }
    }
    CURRENT.set(std::ptr::null_mut());
    block.loops = block.lanes.iter().map(|lane| lane.loops).fold(block.loops, u64::max);
    for mut fiber in fibers {
        if fiber.started() && !fiber.done() {
            // SAFETY: a kernel owns nothing on its stack that would have to be dropped.
            unsafe { fiber.force_reset() };
        }
        if fiber.done() {
            stacks.push(fiber.into_stack());
        }
    }
}

/// Runs the lanes of a warp until each waits for the block or is done.
fn run_warp(warp: usize, fibers: &mut [Fiber], library: &Library) {
    let lanes = warp * WARP..fibers.len().min((warp + 1) * WARP);
    loop {
        let reversed = current(|block| block.random.random::<bool>());
        for at in lanes.clone() {
            let thread = if reversed { lanes.start + lanes.end - 1 - at } else { at };
            let position = current(|block| block.turn(thread));
            let Some(position) = position else { continue };
            library.set_lane(position);
            if let CoroutineResult::Return(()) = fibers[thread].resume(()) {
                current(|block| block.lanes[thread].wait = Wait::Done);
            }
        }
        let released = current(|block| {
            block.watch.flush();
            block.release_warp(lanes.clone())
        });
        if !released {
            return;
        }
    }
}

/// Lends the block that runs on this thread.
fn current<T>(use_it: impl FnOnce(&mut Block) -> T) -> T {
    // SAFETY: `run` has set it to a block that outlives it, every other use of which is such a loan, and none lasts while
    // another begins: fibers are resumed and suspended between loans.
    use_it(unsafe { &mut *CURRENT.get() })
}

impl Block {
    fn begin(&mut self, number: usize, threads: usize) {
        self.number = number;
        self.lanes.clear();
        self.lanes.reserve(threads);
        self.epoch += 1;
        self.watch.started = self.epoch;
        self.steps = vec![0; threads.div_ceil(WARP)];
    }

    /// Gives a thread its turn; None if it waits, is done, or the launch is stopped.
    fn turn(&mut self, thread: usize) -> Option<*const Position> {
        if self.stopped || self.lanes[thread].wait != Wait::Nothing {
            return None;
        }
        self.current = thread;
        Some(&raw const self.lanes[thread].position)
    }

    /// Lets go the lanes of a warp that have all come together; whether there are any.
    fn release_warp(&mut self, lanes: std::ops::Range<usize>) -> bool {
        let mut released = false;
        let first = lanes.start;
        for thread in lanes.clone() {
            let wait = self.lanes[thread].wait;
            let Wait::Warp(mask, _) = wait else { continue };
            let members: Vec<usize> = lanes.clone().filter(|lane| mask >> (lane - first) & 1 == 1).collect();
            if members.iter().any(|&lane| self.lanes[lane].wait != wait) {
                continue;
            }
            let mut values = [0; WARP];
            for &lane in &members {
                values[lane - first] = self.lanes[lane].given;
            }
            for &lane in &members {
                let lane = &mut self.lanes[lane];
                (lane.wait, lane.values) = (Wait::Nothing, values);
            }
            if members.len() == lanes.len() {
                self.steps[first / WARP] += 1;
            }
            released = true;
        }
        released && !self.stopped
    }

    /// Lets the block go on if all of it waits at one barrier; whether it is at its end.
    fn release(&mut self) -> bool {
        if self.stopped || self.lanes.iter().all(|lane| lane.wait == Wait::Done) {
            return true;
        }
        let wait = self.lanes[0].wait;
        if !matches!(wait, Wait::Block(_)) || self.lanes.iter().any(|lane| lane.wait != wait) {
            self.diverged();
            return true;
        }
        self.epoch += 1;
        for lane in &mut self.lanes {
            lane.wait = Wait::Nothing;
        }
        false
    }

    fn diverged(&mut self) {
        let waits = |lane: &Lane| matches!(lane.wait, Wait::Block(_) | Wait::Warp(..));
        let Some(thread) = self.lanes.iter().position(waits) else { return };
        let wait = self.lanes[thread].wait;
        let (Wait::Block(line) | Wait::Warp(_, line)) = wait else { return };
        let other = self.lanes.iter().position(|lane| lane.wait != wait).unwrap_or(thread);
        let finding = Finding::Divergent { other: self.place(other) };
        self.faults.push((0, Fault { place: self.place(thread), line: Some(line), finding }));
        self.stopped = true;
    }

    fn place(&self, thread: usize) -> Place {
        Place { block: self.number, thread }
    }

    /// Has the thread whose turn it is wait; where to suspend it.
    fn wait(&mut self, wait: Wait) -> *const Yielder<(), ()> {
        let lane = &mut self.lanes[self.current];
        lane.wait = wait;
        lane.yielder
    }

    /// Watches an access; whether the launch has to stop before it.
    fn access(&mut self, address: usize, size: usize, kind: u32, site: usize) -> bool {
        let thread = self.current;
        let warp = thread / WARP;
        let number = (self.number * self.lanes.len() + thread + 1) as u32;
        let lane = &mut self.lanes[thread];
        let within = |(first, last): (usize, usize)| address >= first && address < last;
        // The shared memory lies within the library.
        let quiet = within(lane.stack) || within(self.image) || within(self.quiet);
        if quiet && !within(self.shared) {
            return false;
        }
        let stamp = Stamp::new(number, self.epoch, self.steps[warp]);
        let site = site.wrapping_sub(self.image.0).min(self.image.1 - self.image.0);
        let Some(finding) = self.watch.access(&Access { address, size, kind, site, stamp }, &mut lane.times) else {
            return false;
        };
        let kind = std::mem::discriminant(&finding);
        let known = |(at, fault): &(usize, Fault)| *at == site && std::mem::discriminant(&fault.finding) == kind;
        self.stopped |= matches!(finding, Finding::OutOfBounds { .. });
        if !self.faults.iter().any(known) && (self.stopped || self.faults.len() < MOST_FAULTS) {
            self.faults.push((site, Fault { place: self.place(thread), line: None, finding }));
        }
        self.stopped
    }
}

fn suspend(yielder: *const Yielder<(), ()>) {
    // SAFETY: it is the yielder of the fiber that calls this, and lives as long.
    unsafe { (*yielder).suspend(()) };
}

extern "C" fn access(address: usize, size: u32, kind: u32, site: usize) {
    if current(|block| block.access(address, size as usize, kind, site)) {
        suspend(current(|block| block.wait(Wait::Done)));
    }
}

extern "C" fn block_wait(line: u32) {
    suspend(current(|block| block.wait(Wait::Block(line))));
}

extern "C" fn exchange(mask: u32, value: u64, line: u32) -> *const u64 {
    suspend(current(|block| {
        block.lanes[block.current].given = value;
        block.wait(Wait::Warp(mask, line))
    }));
    current(|block| block.lanes[block.current].values.as_ptr())
}

extern "C" fn loop_begins() {
    current(|block| block.lanes[block.current].loops += 1);
}

extern "C" fn product() {
    current(|block| block.products += u64::from(block.current.is_multiple_of(WARP)));
}
