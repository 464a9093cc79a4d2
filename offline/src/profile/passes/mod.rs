//! The passes of a layer, launch by launch: forward, backward with all its gradients, and an update of the tables by these.
//!
//! Tables are memory that nobody has written, for no kernel does anything else for what they hold. The forward pass runs over the first few
//! tokens, and repeats their results. Backwards it matters which rows all tokens read, for their gradients are sorted and added up by
//! row: the oracle chooses the slots of every token, and each launch that writes whole numbers runs whole; of the others some blocks run, on
//! gradients that nobody has written.

mod choices;
mod input;
mod versus;

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::future::block_on;
use ultramem::kernels::empty;
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::{
    ElementType, Error, LayerWeights, MapGradients, MemoryConfig, MemoryLayer, Result, Tensor, ValueTable, Weight,
    Weights,
};

pub use self::choices::{Choices, Popularity};
pub use self::input::hidden_states;
pub use self::versus::Versus;
use super::{Profile, Rates};
use crate::{Adapter, Blocks, Execution, Gpu, OfflineDevice, OfflineRuntime, Options};

/// Tokens of the forward pass that are looked at. The rest repeat them.
const PERIOD: usize = 64;

/// A launch's profile, and the stage that makes it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Staged {
    /// `query`, `score`, `combine`, `weigh` or `expand`, the same with `-backward`, `update`, `dense`, `experts` or `attention`.
    pub stage: &'static str,
    /// The launch.
    #[serde(flatten)]
    pub profile: Profile,
}

/// Launches of one kernel over as many blocks, of one stage, together, in the order of the first.
pub fn by_kernel(staged: &[Staged]) -> Vec<Vec<&Staged>> {
    let mut rows: Vec<Vec<&Staged>> = Vec::new();
    for it in staged {
        let key = |it: &Staged| (it.stage, it.profile.kernel.clone(), it.profile.cubes, it.profile.counted);
        match rows.iter_mut().find(|row| key(row[0]) == key(it)) {
            Some(row) => row.push(it),
            None => rows.push(vec![it]),
        }
    }
    rows
}

/// A layer, what it is given, and the GPU that it is counted for.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The layer.
    pub config: &'a MemoryConfig,
    /// Its weights; the tables' numbers are not looked at.
    pub weights: &'a Weights<'a>,
    /// Hidden states `[tokens, hidden_size]`.
    pub input: &'a [f32],
    /// Element type of weights and activations.
    pub dtype: ElementType,
    /// Whether a token gets the same bits however many there are.
    pub invariant: bool,
    /// The GPU.
    pub gpu: Gpu,
    /// What it reports of itself, where it is not all that it has.
    pub adapter: Option<Adapter>,
    /// Its rates.
    pub rates: &'a Rates,
}

/// A device that counts, and what its launches are profiled by.
struct Counting<'a> {
    device: OfflineDevice,
    client: ComputeClient<OfflineRuntime>,
    gpu: Gpu,
    rates: &'a Rates,
}

impl<'a> Counting<'a> {
    fn new(gpu: Gpu, adapter: Option<Adapter>, rates: &'a Rates) -> Self {
        let device = OfflineDevice::new(Options { gpu, adapter, execution: Execution::Counted, ..Options::default() });
        let client = OfflineRuntime::client(&device);
        Self { device, client, gpu, rates }
    }

    /// Which blocks run from now on.
    fn run(&self, blocks: Blocks) -> Result<()> {
        // Launches that are only enqueued were chosen for before.
        self.sync()?;
        self.device.count(blocks);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        block_on(self.client.sync()).map_err(|error| Error::Device(format!("{error:?}")))
    }

    /// The launches since this was last called, but those of which nothing ran.
    fn taken(&self, stage: &'static str) -> Result<Vec<Staged>> {
        self.sync()?;
        let failed = |error: crate::Error| Error::Device(error.to_string());
        let reports = self.device.take_reports();
        let profiles =
            reports.iter().filter_map(|it| Profile::of(it, self.gpu, self.rates).map_err(failed).transpose());
        profiles.map(|profile| Ok(Staged { stage, profile: profile? })).collect()
    }

    /// Forgets the launches since the last ones were taken.
    fn drop_taken(&self) -> Result<()> {
        self.sync()?;
        self.device.take_reports();
        Ok(())
    }

    /// Memory that nobody has written.
    fn unwritten(&self, name: &'static str, shape: &[usize], dtype: ElementType) -> Result<Tensor<OfflineRuntime>> {
        Ok(empty(&self.client, name, shape, dtype.storage())?)
    }
}

impl<'a> Subject<'a> {
    /// A layer that chooses the fastest strategies, on all that a GPU has, with its rates.
    pub fn new(
        config: &'a MemoryConfig,
        weights: &'a Weights<'a>,
        input: &'a [f32],
        dtype: ElementType,
        (gpu, rates): (Gpu, &'a Rates),
    ) -> Self {
        Self { config, weights, input, dtype, invariant: false, gpu, adapter: None, rates }
    }

    /// Tokens of the input.
    ///
    /// # Errors
    /// An input of no whole rows, or of none.
    pub fn tokens(&self) -> Result<usize> {
        match ultramem::reference::whole_rows("input", self.input.len(), "hidden_size", self.config.hidden_size)? {
            0 => Err(Error::Tensor { name: "input".into(), problem: "holds no token".into() }),
            tokens => Ok(tokens),
        }
    }

    /// What a forward pass launches.
    ///
    /// # Errors
    /// An element type that the GPU lacks, tensors too large for it, weights that do not fit, compilers that are not installed.
    pub fn forward(&self) -> Result<Vec<Staged>> {
        let tokens = self.tokens()?;
        let period = if tokens.is_multiple_of(PERIOD) { PERIOD } else { tokens };
        let counting = Counting::new(self.gpu, self.adapter, self.rates);
        let layer = self.layer(&counting)?;
        counting.sync()?;
        let input = layer.upload(&self.input[..period * self.config.hidden_size].repeat(tokens / period))?;
        if period < tokens {
            counting.run(Blocks::Repeated { tokens, period })?;
        }
        // The input is there.
        counting.drop_taken()?;
        let strategies = layer.strategies(tokens);
        let (mut staged, chosen, weighed) = layer.in_workspace(&input, strategies, || {
            let query = layer.query(&input, strategies.query)?;
            let mut staged = counting.taken("query")?;
            let (_, chosen) = layer.retrieve(&query, strategies.score)?;
            staged.extend(counting.taken("score")?);
            if let Some(last) = staged.last_mut() {
                last.stage = "combine";
            }
            let weighed = layer.weigh(&input, &chosen, strategies.query)?;
            staged.extend(counting.taken("weigh")?);
            Ok::<_, Error>((staged, chosen, weighed))
        })?;
        layer.expand(&input, weighed.as_ref().map_or(&chosen, |(_, weighed)| &weighed.chosen), strategies)?;
        staged.extend(counting.taken("expand")?);
        Ok(staged)
    }

    /// What a backward pass to all gradients launches.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward(&self, choices: &Choices) -> Result<Vec<Staged>> {
        let tokens = self.tokens()?;
        let counting = Counting::new(self.gpu, self.adapter, self.rates);
        counting.run(Blocks::None)?;
        let layer = self.layer(&counting)?;
        let hidden = |name| counting.unwritten(name, &[tokens, self.config.hidden_size], self.dtype);
        let input = hidden("input")?;
        let saved = choices.saved(&counting, &layer, &input)?;
        counting.run(Blocks::Spread { whole: 0 })?;
        let expand = layer.expand_backward(&saved, &hidden("gradient of the output")?)?;
        let mut staged = counting.taken("expand-backward")?;
        let weigh = layer.weigh_backward(&saved, &expand)?;
        staged.extend(counting.taken("weigh-backward")?);
        let grad_scores = weigh.as_ref().map_or(&expand.scores, |weigh| &weigh.scores);
        let combine = layer.combine_backward(&saved, grad_scores)?;
        staged.extend(counting.taken("combine-backward")?);
        let score = layer.score_backward(&saved, &combine.sides)?;
        staged.extend(counting.taken("score-backward")?);
        let z = weigh.map(|weigh| weigh.z);
        let maps = MapGradients { gate: expand.gate, output_gate: expand.output_gate, z };
        layer.query_backward(&input, &score.query, &maps)?;
        staged.extend(counting.taken("query-backward")?);
        Ok(staged)
    }

    /// What an update by `rule` launches, of the values and, where the layer weighs, of the pre-values, by the rows that all tokens chose.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and a rule of numbers that make no sense.
    pub fn update(&self, choices: &Choices, rule: Rule) -> Result<Vec<Staged>> {
        let tokens = self.tokens()?;
        let counting = Counting::new(self.gpu, self.adapter, self.rates);
        counting.run(Blocks::None)?;
        let mut layer = self.layer(&counting)?;
        let hidden = |name| counting.unwritten(name, &[tokens, self.config.hidden_size], self.dtype);
        let saved = choices.saved(&counting, &layer, &hidden("input")?)?;
        let mut values = layer.value_optimiser(rule)?;
        let pre_values = layer.pre_table().is_some().then(|| layer.pre_value_optimiser(rule)).transpose()?;
        // The list of used rows is sorted out; that is the backward pass's.
        counting.run(Blocks::Spread { whole: 0 })?;
        let expand = layer.expand_backward(&saved, &hidden("gradient of the output")?)?;
        let weigh = layer.weigh_backward(&saved, &expand)?;
        counting.drop_taken()?;
        layer.update_values(&mut values, &expand.values, &Step::new(0.1))?;
        if let (Some(mut optimiser), Some(weigh)) = (pre_values, weigh) {
            layer.update_pre_values(&mut optimiser, &weigh.pre_values, &Step::new(0.1))?;
        }
        counting.taken("update")
    }

    /// The layer on a device, its tables memory that nobody has written.
    fn layer(&self, counting: &Counting<'_>) -> Result<MemoryLayer<OfflineRuntime>> {
        let table = |weight: Weight, name| {
            let table = || ValueTable::from_device(counting.unwritten(name, &weight.shape(self.config), self.dtype)?);
            weight.is_in(self.config).then(table).transpose()
        };
        let values = table(Weight::Values, "values")?
            .ok_or_else(|| Error::Tensor { name: "values".into(), problem: "is missing".into() })?;
        let pre_values = table(Weight::PreValues, "pre-values")?;
        let (client, config) = (&counting.client, self.config);
        let weights = LayerWeights::with_tables(client, config, self.weights, self.dtype, values, pre_values)?;
        Ok(MemoryLayer::from_device(client, config.clone(), weights)?.with_invariance(self.invariant))
    }
}
