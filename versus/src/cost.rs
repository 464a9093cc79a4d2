//! What one decoding step of a [`Plan`] must move and do, and what it needs to stand on a device.
//!
//! Weights count once a step, as in [`Cost`](ultramem::Cost): those of the experts that the batch is expected to touch, and the rows
//! that each token reads.

use ultramem::{ElementType, MemoryConfig, StageCost};

use crate::kernels::touched;
use crate::plan::{Plan, Scale};

/// Bytes of an f32 or a u32.
const WORD: u64 = 4;

impl Plan {
    /// The parts of a step for a batch of sequences, all blocks together: the least that each must move and do. The floor of a step
    /// is the sum of its parts' floors. With `cached`, attention over so many positions is one of them.
    pub fn cost(&self, batch: usize, dtype: ElementType, cached: Option<usize>) -> Vec<(&'static str, StageCost)> {
        let Scale { hidden_size, blocks, .. } = self.scale;
        let memory_layers = self.memory_layers();
        let step = Step { tokens: batch as u64, element: dtype.size() as u64, hidden: hidden_size as u64 };
        let mut blocks_parts = vec![("norms", step.norm(if cached.is_some() { 2 } else { 1 }))];
        if let Some(cached) = cached {
            blocks_parts.push(("projections", sum(step.product(3 * step.hidden), step.product(step.hidden))));
            blocks_parts.push(("attention", step.attention(cached as u64)));
        }
        if self.experts > 0 {
            blocks_parts.push(("router", step.product(self.experts as u64)));
            blocks_parts.push(("experts", self.experts_cost(&step, batch)));
        } else {
            blocks_parts.push(("ffn", step.ffn(self.inner as u64, 1.0, 1)));
        }
        let mut parts: Vec<_> = blocks_parts.into_iter().map(|(name, cost)| (name, times(cost, blocks))).collect();
        if let Some(memory) = &self.memory {
            parts.extend(
                memory.cost(batch, dtype).stages().into_iter().map(|(name, cost)| (name, times(cost, memory_layers))),
            );
        }
        parts
    }

    fn experts_cost(&self, step: &Step, batch: usize) -> StageCost {
        step.ffn(self.expert_inner as u64, self.touched_experts(batch), self.top_k as u64)
    }

    /// Experts of a block that a batch is expected to touch, its tokens choosing evenly and apart from each other.
    pub fn touched_experts(&self, batch: usize) -> f64 {
        touched(self.experts, self.top_k, batch)
    }

    /// Bytes of device memory that a [`Decoder`](crate::Decoder) of this plan takes, with the cache of `cached` positions and without
    /// what a step allocates by itself.
    pub fn footprint(&self, batch: usize, dtype: ElementType, cached: Option<usize>) -> u64 {
        let Scale { hidden_size, blocks, .. } = self.scale;
        let (hidden, element) = (hidden_size as u64, dtype.size() as u64);
        let attention = if cached.is_some() { 4 * hidden * hidden } else { 0 };
        let ffn = 2 * hidden * (self.inner + self.experts * self.expert_inner) as u64;
        let block = (attention + ffn + hidden * self.experts as u64) * element;
        let layers = self.memory.as_ref().map_or(0, |memory| memory_bytes(memory, element));
        let tables = self.memory.as_ref().map_or(0, |memory| table_bytes(memory, element));
        let memory = layers * self.memory_layers() as u64 + tables * self.tables() as u64;
        let cache = 2 * self.cache_bytes(batch, element, cached);
        (block + cache) * blocks as u64 + memory
    }

    /// Bytes of the largest buffer that a kernel of this plan binds.
    pub fn largest_tensor(&self, batch: usize, dtype: ElementType, cached: Option<usize>) -> u64 {
        let (hidden, element) = (self.scale.hidden_size as u64, dtype.size() as u64);
        let ffn = hidden * self.inner.max(self.experts * self.expert_inner) as u64 * element;
        let memory = self.memory.as_ref().map_or(0, |memory| {
            // Tables that layers share lie in pages, which fit whatever a kernel binds.
            let rows = if memory.shared.is_some() { 0 } else { memory.table_rows() };
            let values = (rows * memory.value_dim.max(memory.pre_dim)) as u64 * element;
            values.max(memory.slots() as u64 * WORD).max(key_numbers(memory) * WORD)
        });
        ffn.max(memory).max(self.cache_bytes(batch, element, cached)).max(3 * hidden * hidden * element)
    }

    /// Keys, or values, of one block's cache.
    fn cache_bytes(&self, batch: usize, element: u64, cached: Option<usize>) -> u64 {
        (batch * cached.unwrap_or(0) * self.scale.hidden_size) as u64 * element
    }
}

/// The bytes of the tables of one layer, or of layers that share them.
fn table_bytes(memory: &MemoryConfig, element: u64) -> u64 {
    (memory.table_rows() * (memory.value_dim + memory.pre_dim)) as u64 * element
}

/// A memory layer's bytes besides its tables: weights, the keys again as they are scored, and projections again as they are read.
fn memory_bytes(memory: &MemoryConfig, element: u64) -> u64 {
    let of = &memory.capabilities;
    let shuffle = if of.shuffled { memory.slots() as u64 * WORD } else { 0 };
    let keys = key_numbers(memory);
    let gate = if of.gated { memory.value_dim } else { 0 };
    let output = if of.projects { memory.pooled_dim() } else { 0 };
    let z = if of.weigh.is_some_and(|weigh| weigh.projected) { memory.pre_dim } else { 0 };
    let width = memory.query_pairs() * 2 * memory.key_dim + output + gate + z;
    shuffle + keys * (element + 2 * WORD) + 2 * (width * memory.hidden_size) as u64 * element
}

fn key_numbers(memory: &MemoryConfig) -> u64 {
    (memory.heads * 2 * memory.side_keys * memory.key_dim * memory.tucker_rank) as u64
}

/// The sizes that every part of a block has.
struct Step {
    tokens: u64,
    element: u64,
    hidden: u64,
}

impl Step {
    /// `count` additions to the stream, each followed by a norm.
    fn norm(&self, count: u64) -> StageCost {
        let numbers = count * self.tokens * self.hidden;
        StageCost { bytes: 4 * numbers * self.element + self.hidden * WORD, flops: 5 * numbers }
    }

    /// A linear map from the stream.
    fn product(&self, width: u64) -> StageCost {
        let weights = self.hidden * width;
        let bytes = (weights + self.tokens * (self.hidden + width)) * self.element;
        StageCost { bytes, flops: 2 * self.tokens * weights }
    }

    /// One new position against `cached` ones and itself.
    fn attention(&self, cached: u64) -> StageCost {
        let numbers = self.tokens * self.hidden;
        StageCost { bytes: numbers * (2 * cached + 4) * self.element, flops: 4 * numbers * (cached + 1) }
    }

    /// An FFN of `experts` experts that are read, of which each token uses `used`.
    fn ffn(&self, inner: u64, experts: f64, used: u64) -> StageCost {
        let weights = 2 * self.hidden * inner;
        let read = (experts * weights as f64) as u64;
        let bytes = (read + 2 * self.tokens * self.hidden) * self.element;
        StageCost { bytes, flops: 2 * self.tokens * used * weights }
    }
}

fn times(cost: StageCost, count: usize) -> StageCost {
    StageCost { bytes: cost.bytes * count as u64, flops: cost.flops * count as u64 }
}

fn sum(a: StageCost, b: StageCost) -> StageCost {
    StageCost { bytes: a.bytes + b.bytes, flops: a.flops + b.flops }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Design;

    fn bytes(design: Design, scale: &Scale, batch: usize) -> u64 {
        let plan = Plan::new(design, scale).expect("the budget can be spent");
        plan.cost(batch, ElementType::F32, None).iter().map(|(_, cost)| cost.bytes).sum()
    }

    /// The figure that memory layers exist for: at a decoding batch a mixture reads most of its experts, whatever it computes.
    #[test]
    fn a_mixture_s_bytes_follow_its_parameters_and_a_memory_s_do_not() {
        let small = Scale::small();
        let grown = small.with_sparse(2 * small.sparse);
        let growth = |design| bytes(design, &grown, 64) as f64 / bytes(design, &small, 64) as f64;
        assert!(growth(Design::Moe) > 1.6, "{}", growth(Design::Moe));
        assert!(growth(Design::UltraMem) < 1.1, "{}", growth(Design::UltraMem));
    }

    #[test]
    fn one_token_touches_the_experts_that_it_uses() {
        let plan = Plan::new(Design::Moe, &Scale::paper_151m()).expect("the budget can be spent");
        assert!((plan.touched_experts(1) - 2.0).abs() < 1e-9, "{}", plan.touched_experts(1));
        assert!(plan.touched_experts(1024) > 31.9 && plan.touched_experts(1024) <= 32.0);
        let flops: u64 = plan.cost(1, ElementType::BF16, None).iter().map(|(_, cost)| cost.flops).sum();
        let expected = 2 * (plan.activated() - 4 * 1024 * 1024 * 12);
        assert!((flops as f64 / expected as f64 - 1.0).abs() < 0.01, "{flops} operations, expected {expected}");
    }

    #[test]
    fn what_stands_on_the_device_is_counted() {
        for design in Design::ALL {
            let plan = Plan::new(design, &Scale::small()).expect("the budget can be spent");
            let without = plan.footprint(8, ElementType::F32, None);
            let with = plan.footprint(8, ElementType::F32, Some(2048));
            let (attention, cache) = (8 * 4 * 256 * 256 * 4, 8 * 2 * 8 * 2048 * 256 * 4);
            assert_eq!(with - without, attention + cache, "{plan}");
            assert!(without >= 4 * (plan.activated() / 2 + plan.sparse()), "{plan}: {without} bytes");
            assert!(plan.largest_tensor(8, ElementType::F32, None) < 128 << 20, "{plan}");
        }
    }
}
