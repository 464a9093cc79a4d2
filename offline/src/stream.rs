//! Streams as CUDA has them: each does what it is given in order, beside the others, and waits for events of theirs. CubeCL decides which
//! waits there are, as on a GPU.
//!
//! On a host there is no beside. Where [`Options::shuffled`](crate::Options::shuffled) asks for it, what streams are given stays with them until
//! somebody waits for one; then the next to do something is drawn among those that may, so that whatever a wait is missing for is seen.
//! Otherwise everything is done as it is given.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::{MemoryConfiguration, MemoryManagement, MemoryManagementOptions};
use cubecl_runtime::server::{Binding, ServerError};
use cubecl_runtime::stream::EventStreamBackend;
use rand::{Rng, SeedableRng, rngs::StdRng};

use cubecl::ir::MemoryDeviceProperties;

use crate::memory::HostStorage;

/// The moment in a stream when it has done so many tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Event {
    queue: usize,
    position: u64,
}

enum Task {
    Run(Box<dyn FnOnce() + Send>),
    Wait(Event),
}

/// What one stream is to do, and how many tasks it has done.
#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    done: u64,
}

/// What all streams of a device are to do.
struct Schedule {
    queues: Vec<Queue>,
    /// Draws who does something next; None: everything is done at once.
    order: Option<StdRng>,
}

impl Schedule {
    fn give(&mut self, queue: usize, task: Task) {
        match (self.order.is_some(), task) {
            (true, task) => self.queues[queue].tasks.push_back(task),
            (false, Task::Run(run)) => run(),
            // Everything is done.
            (false, Task::Wait(_)) => {}
        }
    }

    fn may_go_on(&self, queue: &Queue) -> bool {
        match queue.tasks.front() {
            Some(Task::Wait(event)) => self.queues[event.queue].done >= event.position,
            Some(Task::Run(_)) => true,
            None => false,
        }
    }

    /// One task of a stream that may go on.
    fn step(&mut self) {
        let ready: Vec<_> = (0..self.queues.len()).filter(|&at| self.may_go_on(&self.queues[at])).collect();
        // Waits are for what was given earlier, so that the earliest of all tasks may always be done.
        let drawn = self.order.as_mut().map_or(0, |order| order.random_range(0..ready.len()));
        let queue = &mut self.queues[ready[drawn]];
        if let Some(Task::Run(run)) = queue.tasks.pop_front() {
            run();
        }
        queue.done += 1;
    }
}

/// A stream: its place in the schedule, and memory of its own.
pub(crate) struct Stream {
    queue: usize,
    schedule: Arc<Mutex<Schedule>>,
    pub memory: MemoryManagement<HostStorage>,
}

impl Stream {
    /// Lets the stream do `task` once it has done all that it was given before.
    pub fn give(&self, task: impl FnOnce() + Send + 'static) {
        lock(&self.schedule).give(self.queue, Task::Run(Box::new(task)));
    }

    /// Returns when the stream has done all that it was given.
    pub fn finish(&self) {
        let mut schedule = lock(&self.schedule);
        while !schedule.queues[self.queue].tasks.is_empty() {
            schedule.step();
        }
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "stream {}", self.queue)
    }
}

/// Makes the streams of a device.
pub(crate) struct Backend {
    schedule: Arc<Mutex<Schedule>>,
    properties: MemoryDeviceProperties,
    logger: Arc<ServerLogger>,
}

impl Backend {
    /// `order`: what the order between streams is drawn from; None does everything as it is given.
    pub fn new(order: Option<u64>, properties: MemoryDeviceProperties, logger: Arc<ServerLogger>) -> Self {
        let schedule = Schedule { queues: Vec::new(), order: order.map(StdRng::seed_from_u64) };
        Self { schedule: Arc::new(Mutex::new(schedule)), properties, logger }
    }
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("streams of an offline device")
    }
}

impl EventStreamBackend for Backend {
    type Stream = Stream;
    type Event = Event;

    fn create_stream(&self) -> Stream {
        let memory = MemoryManagement::from_configuration(
            HostStorage::default(),
            &self.properties,
            MemoryConfiguration::ExclusivePages,
            self.logger.clone(),
            MemoryManagementOptions::new("offline device"),
        );
        let mut schedule = lock(&self.schedule);
        schedule.queues.push(Queue::default());
        Stream { queue: schedule.queues.len() - 1, schedule: self.schedule.clone(), memory }
    }

    fn handle_cursor(stream: &Stream, handle: &Binding) -> u64 {
        // What has no memory was refused some: who uses it hears that.
        stream.memory.get_cursor(handle.memory.clone()).unwrap_or(0)
    }

    fn is_healthy(_: &Stream) -> bool {
        true
    }

    fn flush(stream: &mut Stream) -> Event {
        let queue = &lock(&stream.schedule).queues[stream.queue];
        Event { queue: stream.queue, position: queue.done + queue.tasks.len() as u64 }
    }

    fn wait_event(stream: &mut Stream, event: Event) {
        lock(&stream.schedule).give(stream.queue, Task::Wait(event));
    }

    /// CubeCL waits so before it forgets numbers; nothing hangs on it.
    fn wait_event_sync(_: Event) -> Result<(), ServerError> {
        Ok(())
    }
}

/// A poisoned lock: a task has panicked, which the test that sees it tells.
fn lock(schedule: &Mutex<Schedule>) -> MutexGuard<'_, Schedule> {
    schedule.lock().unwrap_or_else(PoisonError::into_inner)
}
