//! Streams of a device, for a layer's work beside the rest of a model (the paper's section 3.1: a layer's output is needed some blocks later).
//!
//! CubeCL waits by itself where a stream reads what another is to write. It does not where a stream is to overwrite what another still
//! reads: memory that is free again on the host. So a [`Stream`] begins behind all that its thread has enqueued, and whoever goes on with its
//! results waits for all that it was given; in between, its input is kept.

use std::sync::atomic::{AtomicU64, Ordering};

use cubecl::prelude::*;
use cubecl::stream_id::StreamId;
use ultramem_kernels::{Tensor, has_streams};

use crate::{Forward, MemoryLayer, Result};

/// A stream of one's own on a device with streams (CUDA); elsewhere, where there is one queue, everything runs in its order.
///
/// Has memory of its own, which its device's allocator keeps for it.
#[derive(Debug, Clone)]
pub struct Stream(StreamId);

impl Default for Stream {
    fn default() -> Self {
        Self::new()
    }
}

impl Stream {
    /// Another stream than any other. CubeCL has 128 by default, and more numbers share them; threads have the first.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(FIRST);
        Self(StreamId { value: NEXT.fetch_add(1, Ordering::Relaxed) })
    }

    /// The stream number `number` of those that belong to the calling thread: the same one whenever it asks.
    pub fn of_thread(number: usize) -> Self {
        Self(StreamId { value: OF_THREADS + 16 * StreamId::current().value + number as u64 })
    }

    /// Runs `enqueue`, whose launches go to the stream, behind all that this thread has enqueued so far. What `enqueue` reads of this thread's
    /// has to be kept until [`join`](Self::join).
    pub fn fork<R: Runtime, T>(&self, client: &ComputeClient<R>, enqueue: impl FnOnce() -> T) -> T {
        if !has_streams(client) {
            return enqueue();
        }
        wait(client, self.0, StreamId::current());
        self.0.executes(enqueue)
    }

    /// Whatever this thread enqueues from now on comes behind all that the stream was given.
    pub fn join<R: Runtime>(&self, client: &ComputeClient<R>) {
        if has_streams(client) {
            wait(client, StreamId::current(), self.0);
        }
    }
}

/// Numbers that no thread has, of streams that belong to a thread and of others.
const OF_THREADS: u64 = (1 << 48) + 8;
const FIRST: u64 = (1 << 32) + 64;

/// Makes a stream wait for all that another was given: it asks for the other's memory, newer than any that it has waited for, and launches nothing.
fn wait<R: Runtime>(client: &ComputeClient<R>, stream: StreamId, other: StreamId) {
    let mark = other.executes(|| client.empty(1));
    // A failure is the device's, and is told when something is read.
    stream.executes(|| drop(client.get_resource(mark)));
}

/// A forward pass on a stream of its own, not waited for yet. When it is dropped, the thread's stream waits for it.
#[must_use = "its output is there once it is joined"]
pub struct Beside<'a, R: Runtime> {
    joins: Joins<'a, R>,
    forward: Forward<R>,
}

impl<R: Runtime> Beside<'_, R> {
    /// What the pass gives: whatever this thread enqueues from now on may read it.
    pub fn join(self) -> Forward<R> {
        let Self { joins, forward } = self;
        drop(joins);
        forward
    }
}

/// What a stream reads, until it is waited for; then waits for it.
struct Joins<'a, R: Runtime> {
    layer: &'a MemoryLayer<R>,
    stream: &'a Stream,
    _input: Tensor<R>,
}

impl<R: Runtime> Drop for Joins<'_, R> {
    fn drop(&mut self) {
        self.stream.join(&self.layer.client);
    }
}

impl<R: Runtime> MemoryLayer<R> {
    /// [`forward`](Self::forward) on a stream of one's own: it runs beside what this thread enqueues until [`Beside::join`], behind all that it has
    /// enqueued before.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_on<'a>(&'a self, stream: &'a Stream, input: &Tensor<R>) -> Result<Beside<'a, R>> {
        let joins = Joins { layer: self, stream, _input: input.clone() };
        let forward = stream.fork(&self.client, || self.forward(input))?;
        Ok(Beside { joins, forward })
    }
}
