//! The sparse gradients of tables between the backward pass and the optimiser's step.

use std::{
    any::Any,
    fmt,
    marker::PhantomData,
    sync::{Arc, Mutex, MutexGuard},
};

use burn::{
    backend::{Autodiff, autodiff::grads::Gradients},
    module::{
        AutodiffModule, Content, Devices, EmptyRecord, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
        ModuleVisitor,
    },
    tensor::{
        backend::{AutodiffBackend, Backend},
        ops::FloatTensor,
    },
};

use super::MemoryBackend;
use super::engine::{Engine, Rows};
use crate::{Error, Result};

/// How a table learns: sparsely, with a place where its gradients wait, or as a parameter like any other. A module of its own, by which a
/// walk through a model finds the memory layers.
pub(super) struct Learning<B: Backend> {
    pub(super) pending: Option<Pendings>,
    backend: PhantomData<fn() -> B>,
}

/// What a walk through a model meets in each memory layer and nowhere else: a derived module says "Struct:" and its name.
pub(super) const MARK: &str = "ultramem::burn::Memory";

/// The gradients that wait: the sum of the calls of the last backward pass, with the leaf of the graph that stood for the table in the last of
/// them. Or, where an optimiser takes what there is, the sum of all passes. At most a table's size. Every clone of a module shares them.
#[derive(Clone, Default)]
pub(super) struct Pending(Arc<Mutex<Waiting>>);

/// Those of a layer's tables.
#[derive(Clone, Default, Debug)]
pub(super) struct Pendings {
    pub(super) values: Pending,
    pub(super) pre_values: Pending,
}

#[derive(Default)]
struct Waiting {
    /// A [`Sum`].
    sum: Option<Box<dyn Any + Send>>,
    adds_up: bool,
    told: bool,
}

/// The last call's leaf and the sum of the gradients, where a call had a token.
type Sum<B> = (FloatTensor<Autodiff<B>>, Option<Rows<B>>);
/// The same, as a backend with autodiff names it.
type Taken<B> = (FloatTensor<B>, Option<Rows<B>>);

impl Pending {
    /// From now on passes add up until a step takes their sum.
    pub(super) fn add_up(&self) {
        self.lock().adds_up = true;
    }

    /// Takes in a call: its leaf, and its gradients of a table of so many rows, where it had a token. `pass`: what the backward pass has found so
    /// far, which holds the gradients of the leaves of its earlier calls. A pass that finds another's gradients waiting replaces them.
    pub(super) fn put<B: MemoryBackend>(
        &self,
        pass: &Gradients,
        leaf: FloatTensor<Autodiff<B>>,
        gradients: Option<Rows<B>>,
        rows: usize,
    ) -> Result<()> {
        let mut waiting = self.lock();
        let before = match waiting.sum.take().map(|sum| sum.downcast::<Sum<B>>()) {
            Some(Ok(sum)) if waiting.adds_up || pass.get::<B>(&sum.0).is_some() => sum.1,
            Some(_) => {
                if !std::mem::replace(&mut waiting.told, true) {
                    tell();
                }
                None
            }
            None => None,
        };
        let sum = match (before, gradients) {
            (Some(before), Some(gradients)) => Some(B::Engine::sum(&[before, gradients], rows)?),
            (before, gradients) => before.or(gradients),
        };
        waiting.sum = Some(Box::new((leaf, sum)));
        Ok(())
    }

    /// The gradients that wait, if `gradients` has come through their calls.
    pub(super) fn through<B: MemoryBackend + AutodiffBackend>(
        &self,
        gradients: &B::Gradients,
    ) -> Option<Option<Rows<B>>> {
        let waiting = self.lock();
        let sum = waiting.sum.as_ref().and_then(|sum| sum.downcast_ref::<Taken<B>>());
        sum.filter(|(leaf, _)| B::grad(leaf, gradients).is_some()).map(|(_, gradients)| gradients.clone())
    }

    /// The gradients that wait, whatever pass they are of.
    pub(super) fn sum<B: MemoryBackend + AutodiffBackend>(&self) -> Option<Rows<B>> {
        let waiting = self.lock();
        waiting.sum.as_ref().and_then(|sum| sum.downcast_ref::<Taken<B>>()).and_then(|(_, gradients)| gradients.clone())
    }

    /// Lets go of what waits.
    pub(super) fn clear(&self) {
        self.lock().sum = None;
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Says that gradients are lost: to whoever listens to `tracing`'s events, else on stderr.
fn tell() {
    const LOST: &str = "a memory layer: the sparse gradient of a backward pass was given to nobody, and the next pass replaces it, so the \
        value table does not learn. Give each pass's gradients to `Trainer::step`, `Trainer::accumulate` or `SparseTables::take` before the \
        next backward pass, train by Burn's own optimisers within a `SparseOptimizer`, or make the layer with `sparse: false`. This is \
        said once";
    if tracing::event_enabled!(tracing::Level::ERROR) {
        tracing::error!("{LOST}");
    } else {
        eprintln!("ultramem: {LOST}");
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pending({})", usize::from(self.lock().sum.is_some()))
    }
}

impl<B: Backend> Learning<B> {
    pub(super) fn new(sparse: bool) -> Self {
        Self { pending: sparse.then(Pendings::default), backend: PhantomData }
    }

    fn other<C: Backend>(&self) -> Learning<C> {
        Learning { pending: self.pending.clone(), backend: PhantomData }
    }
}

impl<B: Backend> Clone for Learning<B> {
    fn clone(&self) -> Self {
        self.other()
    }
}

impl<B: Backend> fmt::Debug for Learning<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.pending, f)
    }
}

impl<B: Backend> Module<B> for Learning<B> {
    type Record = EmptyRecord;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        devices
    }

    fn fork(self, _: &B::Device) -> Self {
        self
    }

    fn to_device(self, _: &B::Device) -> Self {
        self
    }

    fn visit<Visitor: ModuleVisitor<B>>(&self, visitor: &mut Visitor) {
        visitor.enter_module("", MARK);
        visitor.exit_module("", MARK);
    }

    fn map<Mapper: ModuleMapper<B>>(self, _: &mut Mapper) -> Self {
        self
    }

    fn load_record(self, _: EmptyRecord) -> Self {
        self
    }

    fn into_record(self) -> EmptyRecord {
        EmptyRecord::new()
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for Learning<B> {
    type InnerModule = Learning<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        self.other()
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        module.other()
    }
}

impl<B: Backend> ModuleDisplayDefault for Learning<B> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_formatted(&format!("{self:?}")).optional()
    }
}

impl<B: Backend> ModuleDisplay for Learning<B> {}

/// Counts the memory layers that a model holds.
#[derive(Default)]
pub(super) struct Found {
    pub(super) memories: usize,
}

impl<B: Backend> ModuleVisitor<B> for Found {
    fn enter_module(&mut self, _: &str, container_type: &str) {
        self.memories += usize::from(container_type == MARK);
    }
}

/// That the list of a model's layers is not what the model holds.
pub(super) fn wrong_list(listed: usize) -> Error {
    Error::Config {
        what: "number of memory layers that MemoryModel::memories lists",
        value: listed.to_string(),
        expected: "all of the model's, each once",
    }
}
