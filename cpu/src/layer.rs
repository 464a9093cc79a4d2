//! A layer on the processor: its weights, borrowed, and the stages in their order: `[tokens, hidden_size]` to the same, and gradients back.
//!
//! Sizes are checked here, with the numbers in the error; each stage checks what it is given.

use std::borrow::Cow;

use ultramem_kernels::weigh::Activation;

use crate::shape::{number, whole_rows};
use crate::stages::combine::{self, Chosen};
use crate::stages::expand::{self, Expanded};
use crate::stages::query::{self, InputGradients, MapGradients, OfMaps};
use crate::stages::score::{self, Kept, PreparedKeys};
use crate::stages::weigh::{self, Weighed};
use crate::{Linear, Numbers, Place, Result, RowGradients, Shape};

/// The weights of a layer, borrowed from wherever they lie; those that a layer does not have are None or empty.
#[derive(Debug, Clone)]
pub struct Weights<'a> {
    /// `W_q` `[query_pairs · 2 · key_dim, hidden_size]`.
    pub query: Linear<'a>,
    /// `[key_dim]`.
    pub query_norm: Cow<'a, [f32]>,
    /// `[heads, 2, side_keys, key_dim, tucker_rank]`. Their type is the one that queries and keys are rounded to.
    pub keys: Numbers<'a>,
    /// `[key_dim]`.
    pub keys_norm: Cow<'a, [f32]>,
    /// `[cores, heads, tucker_rank, tucker_rank]`.
    pub cores: Cow<'a, [f32]>,
    /// `u`, `[heads, tucker_rank]`.
    pub core_u: Cow<'a, [f32]>,
    /// `v`, `[heads, tucker_rank]`.
    pub core_v: Cow<'a, [f32]>,
    /// Slot → address, `[side_keys²]`.
    pub shuffle: Option<Cow<'a, [u32]>>,
    /// `V` `[table_rows, value_dim]`.
    pub values: Numbers<'a>,
    /// `P` `[table_rows, pre_dim]`.
    pub pre_values: Option<Numbers<'a>>,
    /// `W_p` `[pre_dim, hidden_size]`.
    pub pre_projection: Option<Linear<'a>>,
    /// `W_g` `[value_dim, hidden_size]`.
    pub gate: Option<Linear<'a>>,
    /// `W_o` `[hidden_size, pooled_blocks · value_dim]`.
    pub projection: Option<Linear<'a>>,
    /// `w` `[1, hidden_size]`.
    pub output_gate: Option<Linear<'a>>,
}

/// A layer that is ready to run. Holds its keys as they are multiplied, in f32, and a sum of its cores; all else is borrowed.
#[derive(Debug, Clone)]
pub struct Layer<'a> {
    pub(crate) shape: Shape,
    pub(crate) weights: Weights<'a>,
    pub(crate) keys: PreparedKeys,
    /// `Σ_k C_k`, `[heads, tucker_rank, tucker_rank]`.
    total_cores: Vec<f32>,
    pub(crate) invariant: bool,
}

/// What a forward pass gives.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Forward {
    /// `[tokens, hidden_size]`.
    pub output: Vec<f32>,
    /// The slots that were read, and their scores before they are weighed.
    pub chosen: Chosen,
}

/// What a forward pass leaves for the backward pass.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Saved {
    /// Queries before their norm, and as they are multiplied.
    raw: Vec<f32>,
    queries: Vec<f32>,
    kept: Kept,
    chosen: Chosen,
    places: Vec<Place>,
    weighed: Option<Weighed>,
    expanded: Expanded,
}

/// The gradients of a backward pass; those of weights that the layer does not have are empty.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Gradients {
    /// Of the input, and of what it is mapped by.
    pub maps: InputGradients,
    /// `[key_dim]`.
    pub query_norm: Vec<f32>,
    /// Of the keys as a table `[heads · 2 · side_keys, key_dim · tucker_rank]`.
    pub keys: RowGradients,
    /// `[key_dim]`.
    pub keys_norm: Vec<f32>,
    /// `[cores, heads, tucker_rank, tucker_rank]`.
    pub cores: Vec<f32>,
    /// Of the value table.
    pub values: RowGradients,
    /// Of the pre-values; None for a layer without them.
    pub pre_values: Option<RowGradients>,
    /// Of `W_o` and its bias.
    pub projection: MapGradients,
}

impl<'a> Layer<'a> {
    /// Checks the weights and prepares the keys.
    ///
    /// # Errors
    /// Sizes that make no layer, or weights of other lengths than they call for.
    pub fn new(shape: Shape, weights: Weights<'a>) -> Result<Self> {
        shape.check()?;
        weights.check(&shape)?;
        let keys = PreparedKeys::new(&shape, &weights);
        let size = shape.heads * shape.tucker_rank * shape.tucker_rank;
        let mut total_cores = vec![0.0; if shape.tucker { size } else { 0 }];
        for core in weights.cores.chunks_exact(size) {
            total_cores.iter_mut().zip(core).for_each(|(total, core)| *total += core);
        }
        Ok(Self { shape, weights, keys, total_cores, invariant: false })
    }

    /// The same for many calls: with copies, f32, of the matrices that a forward pass multiplies, in the order in which it reads them, which cost as
    /// many bytes as the matrices; and with its tables in large pages where the system has them, which takes some two seconds a
    /// gigabyte.
    pub fn prepared(mut self) -> Self {
        self.weights.values.in_large_pages();
        self.weights.pre_values.iter().for_each(Numbers::in_large_pages);
        let (hidden, pooled) = (self.shape.hidden_size, self.shape.pooled_dim());
        self.weights.query = self.weights.query.prepared(hidden);
        let maps = [
            (&mut self.weights.pre_projection, hidden),
            (&mut self.weights.gate, hidden),
            (&mut self.weights.projection, pooled),
        ];
        for (map, inputs) in maps {
            *map = map.take().map(|map| map.prepared(inputs));
        }
        self
    }

    /// The same, giving a token the same bits in a forward pass of any number of tokens: a number of a product is a sum in an order
    /// of its own. Costs a prepared layer nothing.
    pub fn with_invariance(self, invariant: bool) -> Self {
        Self { invariant, ..self }
    }

    /// Its sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// What pre-values are activated by, and their table; None for a layer without them.
    pub(crate) fn pre_values(&self) -> Option<(Activation, &Numbers<'a>)> {
        self.shape.activation.zip(self.weights.pre_values.as_ref())
    }

    /// The sum of a head's cores; empty for additive scores.
    #[inline(always)]
    pub(crate) fn total_core(&self, head: usize) -> &[f32] {
        if self.total_cores.is_empty() {
            return &[];
        }
        let size = self.shape.tucker_rank * self.shape.tucker_rank;
        &self.total_cores[head * size..][..size]
    }

    /// Where a core of a head begins.
    #[inline(always)]
    pub(crate) fn core_at(&self, core: usize, head: usize) -> usize {
        (core * self.shape.heads + head) * self.shape.tucker_rank * self.shape.tucker_rank
    }

    /// A core of a head.
    #[inline(always)]
    pub(crate) fn core(&self, core: usize, head: usize) -> &[f32] {
        &self.weights.cores[self.core_at(core, head)..][..self.shape.tucker_rank * self.shape.tucker_rank]
    }

    /// The output for `input` `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// An input that is not whole rows.
    pub fn forward(&self, input: &[f32]) -> Result<Forward> {
        let (output, saved) = self.run_forward(input)?;
        Ok(Forward { output, chosen: saved.chosen })
    }

    /// The same, and what the backward pass needs of it.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_saving(&self, input: &[f32]) -> Result<(Forward, Saved)> {
        let (output, saved) = self.run_forward(input)?;
        Ok((Forward { output, chosen: saved.chosen.clone() }, saved))
    }

    fn run_forward(&self, input: &[f32]) -> Result<(Vec<f32>, Saved)> {
        whole_rows("numbers of input", input.len(), "hidden_size", self.shape.hidden_size)?;
        among_workers(|| self.stages_forward(input))
    }

    fn stages_forward(&self, input: &[f32]) -> Result<(Vec<f32>, Saved)> {
        let raw = query::forward(self, input)?;
        let queries = query::normalised(self, raw.clone())?;
        let kept = score::forward(self, &queries)?;
        let chosen = combine::forward(self, &kept)?;
        let places = expand::places(self, &chosen.slots)?;
        let weighed = weigh::forward(self, input, &chosen, &places)?;
        let scores = weighed.as_ref().map_or(&chosen.scores, |weighed| &weighed.scores);
        let (output, expanded) = expand::forward(self, input, &places, scores)?;
        Ok((output, Saved { raw, queries, kept, chosen, places, weighed, expanded }))
    }

    /// The gradients of `Σ output · grad_output` for the `input` that `saved` came of. Selections, `u` and `v` are constants.
    ///
    /// # Errors
    /// An input or a gradient of another length.
    pub fn backward(&self, input: &[f32], saved: &Saved, grad_output: &[f32]) -> Result<Gradients> {
        let tokens = saved.raw.len() / self.shape.query_width();
        number("numbers of input", input.len(), tokens * self.shape.hidden_size)?;
        number("numbers of the output's gradient", grad_output.len(), input.len())?;
        among_workers(|| self.stages_backward(input, saved, grad_output))
    }

    fn stages_backward(&self, input: &[f32], saved: &Saved, grad_output: &[f32]) -> Result<Gradients> {
        let (chosen, places) = (&saved.chosen, &saved.places);
        let scores = saved.weighed.as_ref().map_or(&chosen.scores, |weighed| &weighed.scores);
        let expand = expand::backward(self, places, scores, &saved.expanded, grad_output)?;
        let weigh = match &saved.weighed {
            Some(weighed) => weigh::backward(self, input, chosen, places, weighed, &expand.scores)?,
            None => None,
        };
        let (grad_scores, z) = weigh.as_ref().map_or((&expand.scores, &[][..]), |weigh| (&weigh.scores, &weigh.z));
        let combine = combine::backward(self, &saved.kept, chosen, grad_scores)?;
        let score = score::backward(self, &saved.raw, &saved.queries, &saved.kept, &combine.kept)?;
        let of_maps = OfMaps { query: &score.query, z, gate: &expand.gate, output_gate: &expand.output_gate };
        let maps = query::backward(self, input, &of_maps)?;
        Ok(Gradients {
            maps,
            query_norm: score.query_norm,
            keys: score.keys,
            keys_norm: score.keys_norm,
            cores: combine.cores,
            values: expand.rows,
            pre_values: weigh.map(|weigh| weigh.rows),
            projection: expand.projection,
        })
    }
}

/// Runs all of `work` as one of rayon's workers: a thread that is none is put to sleep and woken for each loop that it shares out.
fn among_workers<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}

impl Weights<'_> {
    fn check(&self, shape: &Shape) -> Result<()> {
        let (hidden, rank) = (shape.hidden_size, shape.tucker_rank);
        let normed = |norm: Option<_>| norm.map_or(0, |_| shape.key_dim);
        let of_tucker = |size: usize| if shape.tucker { size } else { 0 };
        number("numbers of the queries' norm", self.query_norm.len(), normed(shape.query_norm))?;
        number("numbers of the keys' norm", self.keys_norm.len(), normed(shape.keys_norm))?;
        number("numbers of the keys", self.keys.len(), shape.all_keys() * shape.key_dim * rank)?;
        number("numbers of the cores", self.cores.len(), of_tucker(shape.cores * shape.heads * rank * rank))?;
        number("numbers of u", self.core_u.len(), of_tucker(shape.heads * rank))?;
        number("numbers of v", self.core_v.len(), of_tucker(shape.heads * rank))?;
        number("numbers of the values", self.values.len(), shape.table_rows * shape.value_dim)?;
        let slots = shape.side_keys * shape.side_keys;
        number("slots of the shuffle", self.shuffle.as_ref().map_or(slots, |shuffle| shuffle.len()), slots)?;
        number("addresses of the slots", shape.rows * (slots / shape.rows), slots)?;
        let largest = self.shuffle.iter().flat_map(|shuffle| shuffle.iter()).copied().max().unwrap_or(0);
        if largest as usize >= slots {
            let (value, limit) = (u64::from(largest), slots as u64 - 1);
            return Err(crate::Error::Exceeds { what: "an address", value, limit_name: "the last slot", limit });
        }
        let pre_values = self.pre_values.as_ref().map_or(0, Numbers::len);
        let weighs = shape.activation.map_or(0, |_| shape.table_rows * shape.pre_dim);
        number("numbers of the pre-values", pre_values, weighs)?;
        let z = if self.pre_projection.is_some() { hidden } else { shape.pre_dim };
        number("width of a pre-value row", shape.activation.map_or(z, |_| hidden), z)?;
        let pooled = shape.pooled_dim();
        let unprojected = if self.projection.is_some() { pooled } else { hidden };
        number("width of the pooled values", pooled, unprojected)?;
        self.query.check("numbers of W_q", shape.query_width(), hidden)?;
        for (map, what, outputs, inputs) in [
            (&self.pre_projection, "numbers of W_p", shape.pre_dim, hidden),
            (&self.gate, "numbers of W_g", pooled, hidden),
            (&self.projection, "numbers of W_o", hidden, pooled),
            (&self.output_gate, "numbers of the output gate", 1, hidden),
        ] {
            map.iter().try_for_each(|map| map.check(what, outputs, inputs))?;
        }
        Ok(())
    }
}

impl Linear<'_> {
    fn check(&self, what: &'static str, outputs: usize, inputs: usize) -> Result<()> {
        number(what, self.weight.len(), outputs * inputs)?;
        number("numbers of a bias", self.bias.as_ref().map_or(outputs, |bias| bias.len()), outputs)
    }
}
