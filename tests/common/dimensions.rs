//! Random layers: any choice of capabilities, any small sizes.

use proptest::prelude::*;
use ultramem::{Activation, Blocks, Capabilities, Dimensions, Norm, Queries, Scores, SharedTable, Weigh};

/// Any choice of capabilities, of a kind or not.
pub fn any_capabilities() -> impl Strategy<Value = Capabilities> {
    let scores = prop_oneof![Just(Scores::Tucker), Just(Scores::Additive)];
    let queries = prop_oneof![Just(Queries::Shared), Just(Queries::PerHead), Just(Queries::PerTwoHeads)];
    let activation = prop_oneof![Just(Activation::Identity), Just(Activation::Gelu)];
    let weigh = proptest::option::of((any::<bool>(), activation));
    let weigh = weigh.prop_map(|weigh| weigh.map(|(projected, activation)| Weigh { projected, activation }));
    let blocks = prop_oneof![Just(Blocks::Apart), Just(Blocks::Summed)];
    (queries, scores, weigh, blocks, any::<[bool; 8]>()).prop_map(|(queries, scores, weigh, blocks, switches)| {
        let [normalises_queries, normalises_keys, shuffled, shares_table, gated, projects, output_gated, biased] =
            switches;
        Capabilities {
            queries,
            normalises_queries,
            normalises_keys,
            scores,
            weigh,
            shuffled,
            shares_table,
            blocks,
            gated: gated && projects,
            projects,
            output_gated,
            biased,
        }
    })
}

/// Sizes small enough to compile and run in about a second; every one of them can be odd.
pub fn any_dimensions() -> impl Strategy<Value = Dimensions> {
    let blocks = prop_oneof![Just((1, 1)), Just((4, 2)), Just((9, 3))];
    let norms = prop_oneof![Just(Norm::Rms), Just(Norm::Layer)];
    let widths = (1..40usize, 1..20usize, 1..10usize, 1..12usize);
    let selection = (1..15usize, 1..20usize, 1..=4usize);
    let shared = proptest::option::of((0..50usize, 0..1000usize));
    (any_capabilities(), blocks, norms, widths, selection, shared, 1..=4usize, 1..=3usize).prop_map(
        |(
            capabilities,
            (expansion, root),
            norm,
            (hidden_size, key_dim, slice, pre_dim),
            (side, top_m, heads),
            shared,
            tucker_rank,
            cores,
        )| {
            let (tucker_rank, cores) =
                if capabilities.scores == Scores::Tucker { (tucker_rank, cores) } else { (1, 1) };
            let apart = capabilities.blocks == Blocks::Apart;
            let (expansion, root) = if capabilities.gated && apart { (1, 1) } else { (expansion, root) };
            let heads = if capabilities.queries == Queries::PerTwoHeads { heads.min(2 * tucker_rank) } else { heads };
            let (side_keys, value_dim) = (side * root, slice * cores);
            let pooled = if apart { expansion * value_dim } else { value_dim };
            let hidden_size = if capabilities.projects { hidden_size } else { pooled };
            let pre_dim = match capabilities.weigh {
                None => 0,
                Some(Weigh { projected: false, .. }) => hidden_size,
                Some(_) => pre_dim,
            };
            let rows = side_keys * side_keys / expansion;
            let shared = shared.map(|(more, offset)| SharedTable { rows: rows + more, offset: offset % (rows + more) });
            Dimensions {
                capabilities,
                hidden_size,
                heads,
                side_keys,
                key_dim,
                tucker_rank,
                top_m: top_m.min(side_keys),
                cores,
                expansion,
                value_dim,
                pre_dim,
                shared,
                norm,
                norm_eps: 1e-5,
            }
        },
    )
}
