//! Tables and shuffles in pages: the numbers of those in one, forward and backward.

use ultramem::kernels::expand::ExpandStrategy;
use ultramem::kernels::from_u32;
use ultramem::{Dimensions, ElementType, HostTensor, Kind, LayerWeights, ValueTable, Weight};

use crate::backward;
use crate::common::small;
use crate::device::{Case, Layer, client, every_strategy, hold};
use crate::shapes::{plain, product_keys, random_case};

/// The layer with its table in pages of `page_rows` rows.
pub fn paged(layer: Layer, page_rows: usize) -> Layer {
    let (weights, config, dtype) = (layer.read_weights().unwrap(), layer.config().clone(), layer.dtype());
    let table = |weight: Weight| {
        let rows = weights.get(weight);
        rows.map(|rows| ValueTable::upload_in_pages(&client(), rows, dtype, page_rows).unwrap())
    };
    let entries = weights.shuffle_index.iter().flat_map(|index| index.chunks(3 * page_rows));
    let shuffle = entries.map(|page| from_u32(&client(), &[page.len()], page).unwrap()).collect();
    let (values, pre_values) = (table(Weight::Values).unwrap(), table(Weight::PreValues));
    let on_device = LayerWeights::upload(&client(), &config, &weights, dtype).unwrap();
    let on_device = LayerWeights { values, pre_values, shuffle, ..on_device };
    Layer::from_device(&client(), config, on_device).unwrap()
}

pub fn in_pages(case: Case, page_rows: usize) -> Case {
    Case { layer: paged(case.layer, page_rows), ..case }
}

/// Several heads, blocks and cores, a gate, both element types; pages that divide the rows and such that don't, and a page for each row.
fn cases() -> [(Case, f64); 8] {
    let case = |dims: &Dimensions, dtype, page_rows| in_pages(random_case(dims, 9, dtype, 3), page_rows);
    let gated = product_keys(Kind::MemoryPlus);
    [
        (case(&plain(), ElementType::F32, 50), 1e-5),
        (case(&plain(), ElementType::F32, 16), 1e-5),
        (case(&plain(), ElementType::F32, 1), 1e-5),
        (case(&plain(), ElementType::F16, 33), 1e-2),
        (case(&product_keys(Kind::ProductKey), ElementType::F32, 100), 1e-5),
        (case(&gated, ElementType::F32, 100), 1e-5),
        (case(&small(Kind::UltraMemV2), ElementType::F32, 10), 1e-5),
        (case(&small(Kind::Peer), ElementType::F32, 30), 1e-5),
    ]
}

#[test]
fn every_strategy_agrees_with_the_oracle() {
    for (case, tolerance) in cases() {
        assert!(case.layer.table().pages().len() > 1);
        assert!(matches!(case.layer.strategies(9).expand, ExpandStrategy::Pooled(_)), "one kernel takes one page");
        let pooled = every_strategy().into_iter().filter(|way| way.expand != ExpandStrategy::Fused);
        pooled.for_each(|strategies| hold(&case, strategies, tolerance).assert_rare());
    }
}

#[test]
fn gradients_agree_with_the_oracle() {
    for (case, tolerance) in cases() {
        backward::hold("pages", &case, 10.0 * tolerance);
    }
}

/// A NaN in rows that no slot reads, the first or the last of a page among them, reaches nothing.
#[test]
fn a_nan_in_a_row_that_is_not_read_stays_there() {
    let case = in_pages(random_case(&plain(), 3, ElementType::F32, 5), 20);
    let strategies = case.layer.strategies(3);
    let before = case.run(&case.input, strategies);
    let config = case.layer.config();
    let shuffle = case.weights.shuffle_index.as_ref().unwrap();
    let mut values = case.weights.numbers(Weight::Values);
    let read: Vec<usize> = before.slots.iter().map(|&slot| shuffle[slot as usize] as usize % config.rows()).collect();
    let spared: Vec<usize> = (0..config.rows()).filter(|row| !read.contains(row)).collect();
    assert!(spared.iter().any(|row| row % 20 == 0) && spared.iter().any(|row| row % 20 == 19), "{spared:?}");
    for row in spared {
        values[row * config.value_dim..][..config.value_dim].fill(f32::NAN);
    }
    let values = HostTensor::from_f32([config.rows(), config.value_dim], &values).unwrap();
    let weights = case.weights.clone().with(Weight::Values, values);
    let hostile = in_pages(Case::new(config, &weights, &case.input, ElementType::F32), 20);
    assert_eq!(hostile.run(&case.input, strategies).output, before.output);
    backward::hold("pages with NaN", &hostile, 1e-4);
}

/// A table that no binding of the device holds. CUDA's are a quarter of all memory.
#[cfg(feature = "wgpu")]
#[test]
fn a_table_larger_than_a_binding_lies_in_pages() {
    let value_dim = 1 << 14;
    let limit = client().properties().memory.max_page_size as usize;
    let side_keys = (limit / (4 * value_dim)).isqrt() + 1;
    let dims = Dimensions {
        side_keys,
        value_dim,
        tucker_rank: 1,
        cores: 1,
        expansion: 1,
        ..(*crate::common::small(Kind::ProductKey)).clone()
    };
    let config = ultramem::MemoryConfig::new(dims).unwrap();
    let weights = ultramem::Weights::random(&config, 4);
    let case = Case::new(&config, &weights, &crate::common::random_input(&config, 5, 6), ElementType::F32);
    assert_eq!(case.layer.table().page_rows(), [limit / (4 * value_dim), config.rows() - limit / (4 * value_dim)]);
    hold(&case, case.layer.strategies(5), 1e-5).assert_rare();
}
