//! Random calls of every public launch of the kernels. A call gives what it documents or an error; it never panics.

use cubecl::prelude::*;
use rand::{Rng, seq::IndexedRandom};
use ultramem::ElementType;
use ultramem::kernels::combine::{
    Chosen, CombineBackwardPlans, CombinePlan, CombineSizes, PairScore, combine, combine_backward, core_shares,
};
use ultramem::kernels::expand::{
    ExpandBackwardPlans, ExpandBackwardSizes, ExpandPlans, ExpandSizes, ExpandStrategy, Memory, Pooled, expand,
    expand_backward, pool,
};
use ultramem::kernels::launch::{Device, Launch};
use ultramem::kernels::linear::{ProjectPlan, ProjectSizes, ProjectStrategy, project};
use ultramem::kernels::optimiser::{Optimiser, Rule, Step, StepPlans, StepSizes};
use ultramem::kernels::query::{Map, MapSizes, QueryBackwardPlans, QueryBackwardSizes, query, query_backward};
use ultramem::kernels::score::{
    Kept, KeyFactors, PreparedKeys, Queries, ScoreBackwardPlans, ScorePlans, ScoreSizes, ScoreStrategy, Scored,
    prepare_keys, score, score_backward,
};
use ultramem::kernels::weigh::{self, PreValues, WeighBackwardPlans, WeighBackwardSizes, WeighPlan, WeighSizes};
use ultramem::kernels::{
    AddressPlan, ColumnSumPlans, Error, JoinPlans, MAX_LOOPS, Norm, NormPlan, NormSizes, RetrievePlans, RowGradients,
    RowSource, ScatterPlan, SortPlans, SumPlans, SumSizes, Tensor, WeightTiles, empty, random, retrieve, transpose,
    u32_storage,
};

use super::draw::{Draw, shaped};

const RULES: [Rule; 4] = [
    Rule::Sgd { momentum: 0.0 },
    Rule::Sgd { momentum: 0.9 },
    Rule::Adagrad { eps: 1e-8 },
    Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true },
];

/// Draws a call from `seed` and makes it on `client`; now and then a tensor is of `other`, of another device. Returns the call's name and whether
/// it was accepted.
pub fn call<R: Runtime>(client: &ComputeClient<R>, other: &ComputeClient<R>, seed: u64) -> (&'static str, bool) {
    let draw = &mut Draw::new(client, other, seed);
    let which = draw.rng.random_range(0..13);
    let (name, result) = match which {
        0 => ("maps", maps(draw)),
        1 => ("query_backward", backward_of_maps(draw)),
        2 => ("prepare_keys", keys(draw).map(drop)),
        3 => ("score", scores(draw)),
        4 => ("combine", combined(draw)),
        5 => ("retrieve", retrieved(draw)),
        6 => ("score_backward", backward_of_scores(draw)),
        7 => ("expand", expanded(draw, false)),
        8 => ("expand_backward", expanded(draw, true)),
        11 => ("weigh", weighed(draw)),
        9 => ("row gradients", row_gradients(draw)),
        10 => ("optimiser", optimised(draw)),
        _ => ("plans", plans(draw)),
    };
    (name, result.is_ok())
}

fn maps<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let ([tokens, depth, width], dtype) = ([draw.size(), draw.size(), draw.size()], draw.element());
    let (input, weight) = (draw.tensor(&[tokens, depth], dtype), draw.tensor(&[depth, width], dtype));
    let [rows, columns] = [draw.size(), draw.size()];
    let matrix = draw.tensor(&[rows, columns], dtype);
    if let Ok(transposed) = transpose(draw.client, &matrix) {
        let shape = matrix.shape().to_vec();
        shaped("transpose", &transposed, &[shape[1], shape[0]]);
    }
    let numbers = random(draw.client, "numbers", &[rows, columns], ElementType::F32, 1.0, 1)?;
    shaped("random", &numbers, &[rows, columns]);
    let strategy = draw.product();
    let bias = draw.float(&[width]);
    let bias = draw.one_in(2).then_some(&bias);
    let found = query(draw.client, &input, &weight, bias, strategy);
    let output = if draw.hostile && draw.one_in(4) { u32_storage() } else { draw.element() };
    let mapped = project(draw.client, &input, &weight, output, strategy)?;
    shaped("project", &mapped, &[input.shape()[0], weight.shape()[1]]);
    found.map(|found| shaped("query", &found, &[input.shape()[0], weight.shape()[1]]))
}

fn backward_of_maps<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let ([tokens, hidden, width, other], dtype) =
        ([draw.size(), draw.size(), draw.size(), draw.size()], draw.element());
    let input = draw.tensor(&[tokens, hidden], dtype);
    let (weight, grad) = (draw.tensor(&[width, hidden], dtype), draw.float(&[tokens, width]));
    let (second_weight, second_grad) = (draw.tensor(&[other, hidden], dtype), draw.float(&[tokens, other]));
    let biased = draw.one_in(2);
    let mut maps = vec![Map { weight: &weight, biased, grad: &grad }];
    if draw.one_in(2) {
        maps.push(Map { weight: &second_weight, biased, grad: &second_grad });
    }
    let more = draw.float(&[tokens, hidden]);
    let more = draw.one_in(2).then_some(&more);
    let strategy = draw.product();
    let found = query_backward(draw.client, &input, &maps, more, strategy)?;
    shaped("gradient of the input", &found.input, &input.shape().to_vec());
    shaped("gradient of the weight", &found.maps[0].weight, &weight.shape().to_vec());
    assert!(found.maps.iter().all(|map| map.bias.is_some() == biased));
    Ok(())
}

/// Keys with their sizes: heads, side_keys, key_dim, rank.
type Keys<R> = (Tensor<R>, PreparedKeys<R>, [usize; 4]);

fn keys<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<Keys<R>, Error> {
    let [heads, side_keys, key_dim, rank] = [draw.some().min(3), draw.some(), draw.some(), draw.some().min(4)];
    let dtype = draw.element();
    let keys = draw.tensor(&[heads, 2, side_keys, key_dim, rank], dtype);
    let (weight, u, v) = (draw.float(&[key_dim]), draw.float(&[heads, rank]), draw.float(&[heads, rank]));
    let norm = draw.norm();
    let norm = draw.one_in(2).then_some((norm, 1e-5, &weight));
    let vectors = draw.one_in(2).then_some((&u, &v));
    let prepared = prepare_keys(draw.client, &keys, &KeyFactors { norm, vectors })?;
    // Other keys than were meant may be keys, too.
    let shape = keys.shape().to_vec();
    Ok((keys, prepared, [shape[0], shape[2], shape[3], shape[4]]))
}

fn scores<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let (_, keys, [heads, side_keys, key_dim, rank]) = keys(draw)?;
    let (tokens, top_m) = (draw.size(), if draw.hostile { draw.size() } else { draw.some().min(side_keys) });
    let heads_per_pair = if draw.hostile { draw.size() } else { draw.some().max(1) };
    let pairs = heads.div_ceil(heads_per_pair.max(1)) + usize::from(draw.one_in(4));
    let (input, norm) = (draw.float(&[tokens, pairs * 2 * key_dim]), draw.float(&[key_dim]));
    let (kind, strategy) = (draw.norm(), draw.split());
    let norm = draw.one_in(2).then_some((kind, 1e-5, &norm));
    let kept = score(draw.client, &Queries { numbers: &input, norm, heads_per_pair }, &keys, top_m, strategy)?;
    let tokens = input.shape()[0];
    shaped("kept keys", &kept.keys, &[tokens, heads, 2, top_m]);
    shaped("kept scores", &kept.scores, &[tokens, heads, 2, top_m, rank]);
    Ok(())
}

fn combined<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let additive = draw.one_in(2);
    let [tokens, heads, top_m] = [draw.size(), draw.some().min(3), draw.some()];
    let [rank, cores] = if additive { [1, 1] } else { [draw.some().min(4), draw.some().min(3)] };
    let kept = Kept {
        keys: draw.tensor(&[tokens, heads, 2, top_m], u32_storage()),
        scores: draw.float(&[tokens, heads, 2, top_m, rank]),
    };
    let core = draw.float(&[cores, heads, rank, rank]);
    let pairs = if additive { PairScore::Additive } else { PairScore::Tucker(&core) };
    let side_keys = if draw.one_in(6) { [0, 65_535, 65_536, 1 << 20][draw.size() % 4] } else { top_m + draw.size() };
    let chosen = combine(draw.client, &kept, side_keys, &pairs)?;
    assert!((1..1 << 16).contains(&side_keys), "side_keys {side_keys}");
    // Others than were meant may fit each other, too.
    let sizes = kept.keys.shape().to_vec();
    shaped("slots", &chosen.slots, &[sizes[0], sizes[1], sizes[3]]);
    let grad = draw.float(&[tokens, heads, top_m, cores]);
    let found = combine_backward(draw.client, &kept, side_keys, &pairs, &chosen, &grad)?;
    shaped("gradient of the sides", &found.sides, &[tokens, heads, top_m, 2, rank]);
    assert_eq!(found.core.is_some(), !additive);
    Ok(())
}

fn retrieved<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let (_, keys, [heads, side_keys, key_dim, rank]) = keys(draw)?;
    let (tokens, top_m) = (draw.size(), draw.some().min(side_keys));
    let (input, norm) = (draw.float(&[tokens, 2 * key_dim]), draw.float(&[key_dim]));
    let core = draw.float(&[2, heads, rank, rank]);
    let pairs = if rank == 1 && draw.one_in(2) { PairScore::Additive } else { PairScore::Tucker(&core) };
    let (kind, strategy) = (draw.norm(), draw.split());
    let norm = draw.one_in(2).then_some((kind, 1e-5, &norm));
    let queries = Queries { numbers: &input, norm, heads_per_pair: heads };
    let (kept, chosen) = retrieve(draw.client, &queries, &keys, top_m, strategy, &pairs)?;
    shaped("kept keys", &kept.keys, &[input.shape()[0], heads, 2, top_m]);
    shaped("slots", &chosen.slots, &[input.shape()[0], heads, top_m]);
    Ok(())
}

fn backward_of_scores<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let (keys, prepared, [heads, side_keys, key_dim, rank]) = keys(draw)?;
    let [tokens, top_m] = [draw.size(), draw.some()];
    let heads_per_pair = draw.some();
    let pairs = heads.div_ceil(heads_per_pair.max(1)) + usize::from(draw.one_in(4));
    let (input, norm) = (draw.float(&[tokens, pairs * 2 * key_dim]), draw.float(&[key_dim]));
    let slots = draw.tensor(&[tokens, heads, top_m], u32_storage());
    let norm = (draw.norm(), 1e-5, &norm);
    let scored = Scored {
        queries: Queries { numbers: &input, norm: draw.one_in(2).then_some(norm), heads_per_pair },
        keys: &keys,
        keys_norm: draw.one_in(2).then_some(norm),
        prepared: &prepared,
        slots: &slots,
    };
    let grad = draw.float(&[tokens, heads, top_m, 2, rank]);
    let found = score_backward(draw.client, &scored, &grad)?;
    shaped("gradient of the query", &found.query, &input.shape().to_vec());
    assert_eq!(found.keys.table_rows(), heads * 2 * side_keys);
    Ok(())
}

/// A shuffle of `slots` entries in some pages.
fn shuffle<R: Runtime>(draw: &mut Draw<'_, R>, slots: usize) -> Vec<Tensor<R>> {
    let first = if draw.one_in(2) { slots } else { slots / 2 };
    let pages = [first, slots - first].into_iter().filter(|&entries| entries > 0);
    pages.map(|entries| draw.tensor(&[entries], u32_storage())).collect()
}

fn expanded<R: Runtime>(draw: &mut Draw<'_, R>, backward: bool) -> Result<(), Error> {
    let ([tokens, heads, top_m, cores], dtype) =
        ([draw.size(), draw.some().min(3), draw.some(), draw.some().min(3)], draw.element());
    let [slice, blocks, hidden] = [draw.some(), draw.some().min(4), draw.some()];
    let value_dim = cores * slice;
    let pages = if draw.one_in(3) { draw.size().min(3) } else { 1 };
    let values: Vec<_> = (0..pages).map(|_| (draw.some(), dtype)).collect();
    let table_rows: usize = values.iter().map(|(rows, _)| rows).sum();
    let values: Vec<_> = values.into_iter().map(|(rows, dtype)| draw.tensor(&[rows, value_dim], dtype)).collect();
    let rows = if draw.one_in(2) { table_rows } else { draw.size().min(table_rows) };
    let offset = if draw.one_in(2) { 0 } else { draw.size().min(table_rows.saturating_sub(1)) };
    let shuffle = shuffle(draw, blocks * rows);
    let summed = draw.one_in(2);
    let pooled_blocks = if summed { 1 } else { blocks };
    let projects = draw.one_in(2);
    let hidden = if projects { hidden } else { pooled_blocks * value_dim };
    let weight = draw.tensor(&[pooled_blocks * value_dim, hidden], dtype);
    let (gate, bias) = (draw.float(&[tokens, value_dim]), draw.float(&[hidden]));
    let output_gate = draw.float(&[tokens]);
    let chosen = Chosen {
        slots: draw.tensor(&[tokens, heads, top_m], u32_storage()),
        scores: draw.float(&[tokens, heads, top_m, cores]),
    };
    let shuffle = if draw.one_in(2) { &shuffle[..] } else { &[] };
    let memory = Memory {
        values: &values,
        rows: RowSource { shuffle, blocks, rows, table_rows, offset, summed },
        weight: projects.then_some(&weight),
        bias: draw.one_in(2).then_some(&bias),
        gate: ((pooled_blocks == 1 || draw.hostile) && draw.one_in(2)).then_some(&gate),
        output_gate: draw.one_in(2).then_some(&output_gate),
    };
    // Other values, another weight or other slots may fit each other, too.
    let value_dim = values.first().and_then(|page| page.shape().get(1)).copied().unwrap_or(value_dim);
    let (scores, columns) = (
        chosen.scores.shape().to_vec(),
        memory.weight.map_or(pooled_blocks * value_dim, |it| it.shape().last().copied().unwrap_or(0)),
    );
    if backward {
        let own = draw.tensor(&[hidden, pooled_blocks * value_dim], dtype);
        let grad = draw.tensor(&[tokens, hidden], dtype);
        let (strategy, own) = (draw.product(), projects.then_some(&own));
        let saved = Pooled { pooled: None, projected: None };
        let found = expand_backward(draw.client, &chosen, &memory, own, saved, &grad, strategy)?;
        shaped("gradient of the scores", &found.scores, &scores);
        assert_eq!(found.weight.is_some(), projects);
        assert_eq!(found.output_gate.is_some(), memory.output_gate.is_some());
        return Ok(());
    }
    let pooled = pool(draw.client, &chosen, &memory, draw.one_in(2))?;
    assert_eq!(pooled.shape()[0], scores[0]);
    let sizes = ExpandSizes {
        tokens,
        slots: heads * top_m,
        cores,
        address: memory.rows.plan(),
        value_dim,
        hidden_size: hidden,
        dtype: ElementType::from_storage(dtype).unwrap(),
        gated: memory.gate.is_some(),
        projects,
        biased: memory.bias.is_some(),
        output_gated: memory.output_gate.is_some(),
        pages,
        shuffle_pages: memory.rows.shuffle.len(),
    };
    let chosen_strategy = ExpandStrategy::choose(draw.client, &sizes);
    let other = if draw.one_in(2) { ExpandStrategy::Fused } else { ExpandStrategy::Pooled(draw.product()) };
    for strategy in [chosen_strategy, other] {
        shaped("output", &expand(draw.client, &chosen, &memory, strategy)?, &[scores[0], columns]);
    }
    Ok(())
}

fn weighed<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let ([tokens, heads, top_m, cores], dtype) =
        ([draw.size(), draw.some().min(3), draw.some(), draw.some().min(3)], draw.element());
    let [blocks, pre_dim, rows] = [draw.some().min(4), draw.some(), draw.some()];
    let pages = if draw.one_in(3) { vec![rows, draw.some()] } else { vec![rows] };
    let table_rows: usize = pages.iter().sum();
    let values: Vec<_> = pages.into_iter().map(|rows| draw.tensor(&[rows, pre_dim], dtype)).collect();
    let shuffle = shuffle(draw, blocks * rows);
    let shuffle = if draw.one_in(2) { &shuffle[..] } else { &[] };
    let offset = draw.size().min(table_rows.saturating_sub(1));
    let activation = if draw.one_in(2) { weigh::Activation::Gelu } else { weigh::Activation::Identity };
    let pre_values = PreValues {
        values: &values,
        rows: RowSource { shuffle, blocks, rows, table_rows, offset, summed: draw.one_in(2) },
        activation,
    };
    let z_type = draw.element();
    let z = draw.tensor(&[tokens, pre_dim], z_type);
    let chosen = Chosen {
        slots: draw.tensor(&[tokens, heads, top_m], u32_storage()),
        scores: draw.float(&[tokens, heads, top_m, cores]),
    };
    let found = weigh::weigh(draw.client, &chosen, &z, &pre_values)?;
    shaped("weighed scores", &found.chosen.scores, &chosen.scores.shape().to_vec());
    shaped("products", &found.products, &chosen.slots.shape().to_vec());
    Ok(())
}

fn row_gradients<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let [rows, width] = [draw.size(), draw.some()];
    let parts = (0..draw.size().min(3)).map(|_| draw.rows(rows, width)).collect::<Result<Vec<_>, _>>()?;
    let sum = RowGradients::sum(draw.client, &parts, rows)?;
    let table = if draw.hostile { draw.size() } else { rows };
    let dense = sum.dense(draw.client, table)?;
    assert_eq!(table, rows, "the table of a gradient");
    shaped("dense", &dense, &[rows, sum.gradients().shape()[1]]);
    Ok(())
}

fn optimised<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let (width, dtype) = (draw.some(), draw.element());
    let lengths: Vec<usize> = (0..draw.some().min(3)).map(|_| draw.some()).collect();
    let rows = lengths.iter().sum();
    let rule = *RULES.choose(&mut draw.rng).unwrap();
    let mut optimiser = Optimiser::new(draw.client, rule, &lengths, width)?;
    let mut table: Vec<_> = lengths.iter().map(|&rows| draw.tensor(&[rows, width], dtype)).collect();
    let gradients = draw.rows(rows, width)?;
    let mask = draw.tensor(&[rows.div_ceil(32)], u32_storage());
    let step = Step { mask: draw.one_in(2).then_some(&mask), ..Step::new(0.1) };
    optimiser.step(draw.client, &mut table, &gradients, &step)?;
    assert_eq!(optimiser.steps(), 1);
    let state: Vec<Vec<_>> =
        optimiser.state().into_iter().map(|(_, pages)| pages.into_iter().cloned().collect()).collect();
    optimiser.restore(7, &state)
}

/// What plans say of sizes, however odd.
fn plans<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let most = [0, 1, 65_535, 65_536, 1 << 20, u32::MAX as usize, usize::MAX / 2, usize::MAX];
    let [a, b, c, d, e] =
        [(); 5].map(|()| if draw.one_in(3) { *most.choose(&mut draw.rng).unwrap() } else { draw.size() });
    let sizes = ScoreSizes {
        tokens: a,
        heads: b,
        query_pairs: 1,
        heads_per_pair: b,
        side_keys: c.min(1 << 12),
        key_dim: d,
        rank: 1,
        top_m: e,
        norm: None,
        direct: true,
        dtype: ElementType::F16,
    };
    ScoreStrategy::choose(draw.client, &sizes);
    ProjectStrategy::choose(draw.client, a, ElementType::F16.storage());
    let strategy = draw.split();
    core_shares(a, b);
    let device = Device::of(draw.client);
    let sort = SortPlans::of(&device, a.min(1 << 30), b);
    sort.launches();
    SumPlans::of(&device, &sort, &SumSizes { factors: c, slice: d, shared: draw.one_in(2) }).launches();
    JoinPlans::of(&device, &[a, b], c, d).launches();
    ScatterPlan::of(&device, a, b, c);
    ColumnSumPlans::of(&device, &[a, c], b);
    WeightTiles::of(&device, a.min(1 << 20), b.min(1 << 20), c.min(1 << 20));
    let (size, step) = (b.min(1 << 20), c.min(64));
    let norm = NormSizes { norm: Norm::Rms, groups: a, size, step, listed: true, normalised: false };
    NormPlan::of(&device, &norm);
    empty(draw.client, "numbers", &[a.min(1 << 20), b], u32_storage())?;
    stage_plans(draw, [a, b, c, d, e], strategy)
}

/// Plans of both passes' stages and of an update from such sizes: within the device's limits, or an error.
fn stage_plans<R: Runtime>(
    draw: &mut Draw<'_, R>,
    [a, b, c, d, e]: [usize; 5],
    strategy: ScoreStrategy,
) -> Result<(), Error> {
    let (device, dtype, product) = (Device::of(draw.client), ElementType::F16, draw.product());
    let (rank, cores) = (draw.size(), draw.size());
    let score = ScoreSizes {
        tokens: a,
        heads: b,
        query_pairs: 1,
        heads_per_pair: b,
        side_keys: c,
        key_dim: d,
        rank,
        top_m: e,
        norm: draw.one_in(2).then_some(Norm::Layer),
        direct: rank == 1 && draw.one_in(2),
        dtype,
    };
    let combine = CombineSizes { tokens: a, heads: b, side_keys: c, top_m: e, rank, cores, additive: rank == 1 };
    let address =
        AddressPlan { blocks: b, rows: c, table_rows: d, shuffled: true, summed: draw.one_in(2), shared: true };
    let pages = draw.size();
    let expand = ExpandSizes {
        tokens: a,
        slots: e,
        cores,
        address,
        value_dim: d,
        hidden_size: c,
        dtype,
        gated: draw.one_in(2),
        projects: true,
        biased: draw.one_in(6),
        output_gated: draw.one_in(6),
        pages,
        shuffle_pages: draw.size(),
    };
    let activation = weigh::Activation::Gelu;
    let weigh = WeighSizes { tokens: a, slots: e, cores, address, pre_dim: d, dtype, activation, pages };
    let backward = BackwardSizes { score, combine, expand, weigh, product };
    let by = if draw.one_in(2) { ExpandStrategy::Fused } else { ExpandStrategy::Pooled(product) };
    let forward: [Result<Vec<Launch>, Error>; 7] = [
        ScorePlans::of(&device, &score, strategy).map(|plans| plans.launches()),
        CombinePlan::of(&device, &combine).map(|planned| vec![planned.launch]),
        RetrievePlans::of(&device, &score, strategy, &combine).map(|plans| plans.launches()),
        ExpandPlans::of(&device, &expand, by).map(|plans| plans.launches()),
        WeighPlan::of(&device, &weigh).map(|planned| vec![planned.launch]),
        ProjectPlan::of(&device, &ProjectSizes { tokens: a, depth: b, width: c, dtype }, draw.one_in(2))
            .map(|planned| vec![planned.launch]),
        product
            .plan(&device, &ProjectSizes { tokens: a, depth: b, width: c, dtype })
            .map(|plans| plans.map_or(Vec::new(), |plans| plans.launches())),
    ];
    let plans = forward.into_iter().chain(backward.plans(draw, &device)).collect::<Vec<_>>();
    let refused = plans.iter().find_map(|plan| plan.as_ref().err()).cloned();
    for launch in plans.into_iter().flatten().flatten() {
        assert!(launch.units > 0 && launch.shared_bytes <= device.shared_bytes, "{launch:?}");
        assert!(launch.loops <= MAX_LOOPS && (launch.cubes == 0) == (a == 0), "{launch:?}");
    }
    refused.map_or(Ok(()), Err)
}

/// The sizes that backward passes share with their stages.
struct BackwardSizes {
    score: ScoreSizes,
    combine: CombineSizes,
    expand: ExpandSizes,
    weigh: WeighSizes,
    product: ProjectStrategy,
}

impl BackwardSizes {
    /// The plans of each stage's backward pass, and of a step of an optimiser. A launch of no cubes is not made, so it is left out here.
    fn plans<R: Runtime>(&self, draw: &mut Draw<'_, R>, device: &Device) -> Vec<Result<Vec<Launch>, Error>> {
        let Self { score, combine, expand, weigh, product } = *self;
        let shuffle_pages = expand.shuffle_pages;
        let expand = ExpandBackwardSizes { forward: expand, pooled: draw.one_in(2), projected: draw.one_in(2) };
        let weigh = WeighBackwardSizes { forward: weigh, shuffle_pages, z: ElementType::F16 };
        let map = MapSizes { width: combine.rank, biased: draw.one_in(2) };
        let query = QueryBackwardSizes {
            tokens: combine.tokens,
            hidden_size: combine.side_keys,
            dtype: ElementType::F16,
            maps: vec![map; draw.size().min(3)],
            more: draw.one_in(2),
        };
        let step = StepSizes { rows: combine.tokens, width: combine.side_keys, pages: draw.size() };
        let rule = *RULES.choose(&mut draw.rng).unwrap();
        let plans = vec![
            CombineBackwardPlans::of(device, &combine).map(|plans| plans.launches()),
            ScoreBackwardPlans::of(device, &score, draw.one_in(2).then_some(Norm::Rms)).map(|plans| plans.launches()),
            ExpandBackwardPlans::of(device, &expand, product).map(|plans| plans.launches()),
            WeighBackwardPlans::of(device, &weigh).map(|plans| plans.launches()),
            QueryBackwardPlans::of(device, &query, product).map(|plans| plans.launches()),
            StepPlans::of(device, &rule, &step).map(|plans| plans.launches()),
        ];
        let none = combine.tokens == 0;
        plans
            .into_iter()
            .map(|it| it.inspect(|it| assert!(!none || it.iter().all(|launch| launch.cubes == 0))))
            .collect()
    }
}
