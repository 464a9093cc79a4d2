//! Makes a comparison fit a device: all models stand on it at once, for they are measured in turn. What has to be made smaller for that is
//! said in words.

use ultramem::ElementType;
use ultramem_versus::{Design, Plan, Scale};

use crate::backend::Adapter;
use crate::failure::{Failure, Result};
use crate::numbers::{bytes, counted, grouped};

/// What a device takes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of the largest buffer that a kernel can bind.
    pub binding: u64,
    /// Bytes of all buffers, where that is known.
    pub memory: Option<u64>,
}

/// The share of a device's memory that models and caches may take: the rest is for what a step allocates.
const SHARE: f64 = 0.75;

impl Limits {
    /// The limits of a device.
    pub fn of(adapter: &Adapter) -> Result<Self> {
        let properties = adapter.properties().ok_or_else(|| Failure::new("the reference has no device"))?;
        let memory = adapter.memory().map(|memory| (memory as f64 * SHARE) as u64);
        Ok(Self { binding: properties.memory.max_page_size, memory })
    }

    /// Whether models stand on the device together, with one cache for all; if not, why not.
    fn refuse(&self, plans: &[Plan], step: Step) -> Option<String> {
        let Step { batch, dtype, cached } = step;
        let largest = plans.iter().map(|plan| plan.largest_tensor(batch, dtype, cached)).max().unwrap_or(0);
        if largest > self.binding {
            let (largest, limit) = (bytes(largest), bytes(self.binding));
            return Some(format!("its largest tensor takes {largest}, a kernel binds {limit} at most"));
        }
        let needed = footprint(plans, step);
        let memory = self.memory.filter(|&memory| needed > memory)?;
        Some(format!("the models together take {}, {} may be used", bytes(needed), bytes(memory)))
    }
}

/// What is asked of a model at once.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Sequences.
    pub batch: usize,
    /// Element type of weights and activations.
    pub dtype: ElementType,
    /// Positions that attention reads; None without attention.
    pub cached: Option<usize>,
}

/// Bytes of all models and one cache.
fn footprint(plans: &[Plan], Step { batch, dtype, cached }: Step) -> u64 {
    let weights = |plan: &Plan| plan.footprint(0, dtype, cached);
    let cache = plans.first().map_or(0, |plan| plan.footprint(batch, dtype, cached).saturating_sub(weights(plan)));
    plans.iter().map(weights).sum::<u64>() + cache
}

/// A comparison that fits.
#[derive(Debug)]
pub struct Fitted {
    /// One for each design.
    pub plans: Vec<Plan>,
    /// What was made smaller, and why.
    pub notes: Vec<String>,
}

/// The plans of `designs` at the scale nearest to `scale` that fits: with fewer sparse parameters where a binding is too small, with
/// fewer blocks where memory is, and with the parameters spread over more memory layers where that keeps more of them.
pub fn fitted(designs: &[Design], scale: &Scale, step: Step, limits: Limits) -> Result<Fitted> {
    let whole = plans(designs, scale)?;
    let Some(reason) = limits.refuse(&whole, step) else {
        return Ok(Fitted { plans: whole, notes: Vec::new() });
    };
    let layers = [1, 2, 4].map(|times| times * scale.memory_layers).into_iter().filter(|&it| it <= scale.blocks);
    let found = layers.filter_map(|memory_layers| cut(designs, &Scale { memory_layers, ..*scale }, step, limits));
    let size = |plans: &[Plan]| plans.first().map(|plan| (plan.scale.blocks, plan.scale.sparse));
    let best = found.reduce(|best, other| if size(&other) > size(&best) { other } else { best });
    let best = best.ok_or_else(|| Failure::new(format!("no part of this model fits the device: {reason}")))?;
    let notes = best.first().map(|plan| note(scale, &plan.scale, &reason)).into_iter().collect();
    Ok(Fitted { plans: best, notes })
}

/// The largest part of `scale` that fits.
fn cut(designs: &[Design], scale: &Scale, step: Step, limits: Limits) -> Option<Vec<Plan>> {
    for blocks in fewer_blocks(scale) {
        for smaller in fewer_parameters(scale.with_blocks(blocks)) {
            let Ok(plans) = plans(designs, &smaller) else { continue };
            if limits.refuse(&plans, step).is_none() {
                return Some(plans);
            }
            // What fits a binding and no memory wants fewer blocks, not fewer parameters, while there are some.
            if blocks > 1 && plans.iter().all(|plan| fits_binding(plan, step, limits)) {
                break;
            }
        }
    }
    None
}

fn plans(designs: &[Design], scale: &Scale) -> ultramem::Result<Vec<Plan>> {
    designs.iter().map(|&design| Plan::new(design, scale)).collect()
}

fn fits_binding(plan: &Plan, Step { batch, dtype, cached }: Step, limits: Limits) -> bool {
    plan.largest_tensor(batch, dtype, cached) <= limits.binding
}

/// All sparse parameters, then fewer: whole experts of every block, for a mixture has no others.
fn fewer_parameters(scale: Scale) -> Vec<Scale> {
    let moe = Plan::new(Design::Moe, &scale).ok();
    let (idle, sparse) = moe.map_or((1, scale.sparse), |plan| (plan.experts - plan.top_k, plan.sparse()));
    let fewer = (1..idle as u64).rev().map(|experts| scale.with_sparse(sparse / idle as u64 * experts));
    [scale].into_iter().chain(fewer).collect()
}

/// All blocks, then fewer: whole memory layers' worth as long as that is possible.
fn fewer_blocks(scale: &Scale) -> impl Iterator<Item = usize> {
    let (blocks, layers) = (scale.blocks, scale.memory_layers);
    (1..=blocks).rev().filter(move |&fewer| (fewer * layers).is_multiple_of(blocks) || fewer * layers < blocks)
}

fn note(wanted: &Scale, found: &Scale, reason: &str) -> String {
    let millions = |number: u64| format!("{:.0}", number as f64 / 1e6);
    let layers = match found.memory_layers * wanted.blocks == wanted.memory_layers * found.blocks {
        true => String::new(),
        false => format!(" in {}", counted(found.memory_layers, "memory layer")),
    };
    format!(
        "Scaled down to this device: {} of {}, {} of {} million sparse parameters{layers} ({reason}).",
        grouped(found.blocks),
        counted(wanted.blocks, "block"),
        millions(found.sparse),
        millions(wanted.sparse),
    )
}

/// The batches that fit, and a note for the rest.
pub fn batches(plans: &[Plan], wanted: &[usize], step: Step, limits: Limits) -> (Vec<usize>, Vec<String>) {
    let reason = |batch: usize| limits.refuse(plans, Step { batch, ..step });
    let (fit, rest): (Vec<usize>, Vec<usize>) = wanted.iter().partition(|&&batch| reason(batch).is_none());
    let why = rest.first().and_then(|&batch| reason(batch));
    let names: Vec<String> = rest.iter().map(|&batch| grouped(batch)).collect();
    let notes = why.map(|why| format!("Left out: batch {} ({why}).", super::listed(&names)));
    (fit, notes.into_iter().collect())
}

/// All designs with so many times the first size's sparse parameters.
#[derive(Debug)]
pub struct Size {
    /// How many times.
    pub factor: usize,
    /// The dense one, then those that grow.
    pub plans: Vec<Plan>,
}

/// The sizes that stand on the device together, and a note for the rest.
pub fn growing(mut sizes: Vec<Size>, step: Step, limits: Limits) -> Result<(Vec<Size>, Vec<String>)> {
    let mut left_out: Vec<String> = Vec::new();
    let mut why = None;
    while let Some(reason) = limits.refuse(&sizes.iter().flat_map(|size| size.plans.clone()).collect::<Vec<_>>(), step)
    {
        left_out.extend(sizes.pop().map(|size| format!("×{}", size.factor)));
        if sizes.is_empty() {
            return Err(Failure::new(format!("no size of these models fits the device: {reason}")));
        }
        why.get_or_insert(reason);
    }
    left_out.reverse();
    let notes = why.map(|why| format!("Left out: {} ({why}).", super::listed(&left_out)));
    Ok((sizes, notes.into_iter().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Step = Step { batch: 1, dtype: ElementType::F32, cached: Some(2048) };
    const GB: u64 = 1 << 30;

    #[test]
    fn what_fits_is_left_as_it_is() {
        let limits = Limits { binding: 16 * GB, memory: None };
        let fitted = fitted(&Design::ALL, &Scale::paper_151m(), STEP, limits).expect("it fits");
        assert!(fitted.notes.is_empty(), "{:?}", fitted.notes);
        assert!(fitted.plans.iter().all(|plan| plan.scale == Scale::paper_151m()));
    }

    #[test]
    fn a_small_binding_takes_sparse_parameters_and_little_memory_takes_blocks() {
        let binding = Limits { binding: GB / 8, memory: None };
        let memory = Limits { binding: 16 * GB, memory: Some(16 * GB) };
        for (limits, blocks) in [(binding, true), (memory, false)] {
            let fitted = fitted(&Design::ALL, &Scale::paper_151m(), STEP, limits).expect("a part of it fits");
            assert_eq!(fitted.plans.len(), Design::ALL.len());
            assert_eq!(fitted.plans[0].scale.blocks == 12, blocks, "{:?}", fitted.notes);
            assert!(fitted.notes[0].contains("Scaled down to this device"), "{:?}", fitted.notes);
            assert!(limits.refuse(&fitted.plans, STEP).is_none());
        }
        assert!(fitted(&Design::ALL, &Scale::paper_1_6b(), STEP, Limits { binding: 1000, memory: None }).is_err());
    }

    #[test]
    fn every_model_has_a_part_that_fits_a_software_device() {
        let limits = Limits { binding: 128 << 20, memory: Some(16 * GB) };
        for scale in [Scale::small(), Scale::paper_151m(), Scale::paper_680m(), Scale::paper_1_6b()] {
            let fitted = fitted(&Design::ALL, &scale, STEP, limits).unwrap_or_else(|why| panic!("{scale:?}: {why}"));
            assert!(fitted.plans.len() == Design::ALL.len(), "{:?}", fitted.notes);
        }
    }

    #[test]
    fn batches_that_do_not_fit_are_left_out_and_named() {
        let limits = Limits { binding: GB / 8, memory: None };
        let plans = plans(&Design::ALL, &Scale::small()).expect("the budget can be spent");
        let (fit, notes) = batches(&plans, &[1, 64, 1024, 4096], STEP, limits);
        assert_eq!(fit, [1, 64]);
        assert!(notes[0].contains("1,024 and 4,096"), "{notes:?}");
    }
}
