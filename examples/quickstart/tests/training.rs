//! Training by the Burn modules: sparse tables learn what dense ones do, an error changes nothing, a clone is a copy, and a trainer that was
//! saved goes on with the same bits. Each test runs on the plain backend, on the one with fusion and on the processor's.

mod support;

use std::{cell::RefCell, sync::Once};

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module, Param},
    optim::{AdamWConfig, GradientsAccumulator, GradientsParams, Optimizer},
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use ultramem::{
    Dimensions, Kind, MemoryConfig, Weight, Weights,
    burn::{
        Memory, MemoryBackend, MemoryModel, SparseOptimizer, SparseTables, TableRecord, Trainer, TrainerConfig,
        UltraMemV2, UltraMemV2Config,
    },
    kernels::optimiser::Rule,
    reference,
};

use support::checks::trainer_goes_on_with_the_same_bits;
use support::common::{self, random_input, relative_l2, small};
use support::{KINDS, One, Plain, Processor, memory, numbers, on_each_backend, step, tensor, weights_of};

on_each_backend! {
    sparse_step_is_the_dense_one
    several_passes_are_added_up
    frozen_layer_stays
    trainer_goes_on_with_the_same_bits
    core_follows_and_auxiliary_loss_is_pytorch
    misuse_is_an_error
    an_error_gives_the_model_back
    accumulate_takes_all_or_nothing
    records_go_where_they_belong
    a_clone_is_a_copy
    a_clone_in_another_thread_never_changes
    a_gradient_that_nobody_takes_is_told_once
    sparse_optimizer_is_the_trainer
    sparse_tables_go_beside_an_optimiser
    an_empty_batch_is_empty
}

/// Lazy Adam and Adam differ in rows that were not read, and there from the second step on alone.
fn sparse_step_is_the_dense_one<B: MemoryBackend>() {
    for config in KINDS.map(small) {
        let [sparse, dense] = [true, false].map(|sparse| {
            let mut trainer = Trainer::new(TrainerConfig::new(10));
            weights_of(&step::<B>(&mut trainer, One { memory: memory(&config, 6, sparse).0 }, 7).memory)
        });
        let start = Weights::random(&config, 6);
        for (name, sparse, dense, start) in [
            ("values", &sparse[Weight::Values], &dense[Weight::Values], &start[Weight::Values]),
            ("keys", &sparse[Weight::Keys], &dense[Weight::Keys], &start[Weight::Keys]),
            ("query_proj", &sparse[Weight::QueryProj], &dense[Weight::QueryProj], &start[Weight::QueryProj]),
        ] {
            let off = relative_l2(&sparse.to_f32(), &dense.to_f32());
            let moved = relative_l2(&sparse.to_f32(), &start.to_f32());
            assert!(off < 1e-5 && moved > 1e-3, "{:?} {name}: {off}, moved {moved}", config.kind());
        }
    }
}

/// The processor and a GPU's kernels learn the same in two steps.
#[test]
fn a_step_on_the_processor_is_a_device_s() {
    fn learnt<B: MemoryBackend>(kind: Kind) -> Weights<'static> {
        let mut trainer = trainer::<B>();
        let model = step::<B>(&mut trainer, one(kind, 6), 0);
        weights_of(&step::<B>(&mut trainer, model, 1).memory)
    }
    for kind in KINDS {
        let (found, expected) = (learnt::<Processor>(kind), learnt::<Plain>(kind));
        for weight in Weight::ALL.into_iter().filter(|&weight| found.get(weight).is_some()) {
            let off = relative_l2(&found[weight].to_f32(), &expected[weight].to_f32());
            assert!(off < 1e-4, "{kind:?} {weight:?}: {off}");
        }
    }
}

/// A sparse step on the processor writes the table where it lies, and there the rows alone that were read.
#[test]
fn a_step_on_the_processor_is_in_place() {
    let config = MemoryConfig::new(Dimensions { side_keys: 32, top_m: 4, ..Dimensions::default() }).unwrap();
    let (memory, before) = memory::<Autodiff<Processor>>(&config, 1, true);
    let (width, mut trainer) = (config.value_dim, trainer::<Processor>());
    let (copies, model) = told("is copied", || step::<Processor>(&mut trainer, One { memory }, 0));
    assert_eq!(copies, 0);
    let (after, before) = (weights_of(&model.memory).numbers(Weight::Values), before.numbers(Weight::Values));
    let changed = after.chunks(width).zip(before.chunks(width)).filter(|(after, before)| after != before).count();
    assert!((1..=9 * config.heads * config.top_m).contains(&changed), "{changed}");
}

/// Two calls in one graph, and two passes in one step: a sparse table learns what a dense one does. A pass that nobody takes changes nothing.
fn several_passes_are_added_up<B: MemoryBackend>() {
    for config in KINDS.map(small) {
        let loss = |memory: &Memory<Autodiff<B>>, seed| {
            let input = random_input(&config, 9, seed);
            memory.forward(tensor::<Autodiff<B>>(&input, config.hidden_size)).square().sum()
        };
        let in_one_graph = |sparse| {
            let memory = memory::<Autodiff<B>>(&config, 6, sparse).0;
            let gradients = (loss(&memory, 1) + loss(&memory, 2)).backward();
            let (model, _) = Trainer::new(TrainerConfig::new(10)).step(0.01, One { memory }, gradients).unwrap();
            weights_of(&model.memory)
        };
        let in_two_passes = |sparse, another: bool| {
            let mut model = One { memory: memory::<Autodiff<B>>(&config, 6, sparse).0 };
            let mut trainer = Trainer::new(TrainerConfig::new(10));
            let gradients = loss(&model.memory, 1).backward();
            trainer.accumulate(&mut model, gradients).unwrap();
            if another {
                let _ = loss(&model.memory, 3).backward();
            }
            let gradients = loss(&model.memory, 2).backward();
            let (model, report) = trainer.step(0.01, model, gradients).unwrap();
            assert!(report.done && trainer.steps() == 1);
            weights_of(&model.memory)
        };
        let (start, expected) = (Weights::random(&config, 6), in_one_graph(false));
        let found =
            [in_one_graph(true), in_two_passes(false, false), in_two_passes(true, false), in_two_passes(true, true)];
        for (at, found) in found.iter().enumerate() {
            for (name, found, expected, start) in [
                ("values", &found[Weight::Values], &expected[Weight::Values], &start[Weight::Values]),
                ("keys", &found[Weight::Keys], &expected[Weight::Keys], &start[Weight::Keys]),
            ] {
                let off = relative_l2(&found.to_f32(), &expected.to_f32());
                let moved = relative_l2(&found.to_f32(), &start.to_f32());
                assert!(off < 1e-5 && moved > 1e-3, "{:?}, {at}: {name}: {off}, moved {moved}", config.kind());
            }
        }
        assert!(found[2] == found[3], "a pass that nobody took");
    }
}

/// Gradients go through a layer that does not learn, and leave nothing in it.
fn frozen_layer_stays<B: MemoryBackend>() {
    let config = small(Kind::UltraMem);
    let model = One { memory: memory::<Autodiff<B>>(&config, 6, true).0 }.no_grad();
    let input = tensor::<Autodiff<B>>(&random_input(&config, 9, 1), config.hidden_size).require_grad();
    let gradients = model.memory.forward(input.clone()).square().sum().backward();
    assert!(numbers(input.grad(&gradients).unwrap()).iter().any(|&g| g != 0.0));
    let (model, _) = Trainer::new(TrainerConfig::new(10)).step(0.01, model, gradients).unwrap();
    let (found, start) = (weights_of(&model.memory), Weights::random(&config, 6));
    assert!(found[Weight::Values] == start[Weight::Values] && found[Weight::Keys] == start[Weight::Keys]);
    assert!(format!("{:?}", model.memory).contains("Pending(0)"));
}

fn core_follows_and_auxiliary_loss_is_pytorch<B: MemoryBackend>() {
    for (name, file) in common::golden_files() {
        if !file.config().tucker() || !file.has("expected.core_singular_values_tail_loss") {
            continue;
        }
        let weights = file.weights().unwrap();
        let memory = Memory::from_weights(file.config().clone(), &weights, true, &Default::default()).unwrap();
        let mut trainer = Trainer::<Autodiff<B>, One<Autodiff<B>>>::new(TrainerConfig::new(1));
        let input = tensor::<Autodiff<B>>(&random_input(file.config(), 3, 13), file.config().hidden_size);
        let gradients = memory.forward(input).sum().backward();
        let (model, report) = trainer.step(0.0, One { memory }, gradients).unwrap();
        let expected = file.tensor("expected.core_singular_values_tail_loss").unwrap().to_f32()[0];
        assert!(
            (report.auxiliary_loss - expected).abs() <= 1e-5 * expected.max(1e-3),
            "{name}: {report:?}, {expected}"
        );
        // At a learning rate of 0 the cores stay, and so must their vectors.
        let found = weights_of(&model.memory);
        assert!(relative_l2(&found.core_u, &weights.core_u) < 1e-4, "{name}: {:?} {:?}", found.core_u, weights.core_u);
        assert!(relative_l2(&found.core_v, &weights.core_v) < 1e-4, "{name}: {:?} {:?}", found.core_v, weights.core_v);
    }
}

/// A model that forgets its layer.
#[derive(Module, Debug)]
struct Forgetful<B: burn::tensor::backend::Backend> {
    memory: Memory<B>,
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for Forgetful<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        vec![]
    }
}

fn misuse_is_an_error<B: MemoryBackend>() {
    let config = small(Kind::UltraMem);
    let (layer, _) = memory::<Autodiff<B>>(&config, 14, true);
    let narrow = layer.try_forward(Tensor::<Autodiff<B>, 3>::zeros([2, 3, 10], &Default::default()));
    assert_eq!(narrow.unwrap_err().to_string(), "input has shape [2, 3, 10], expected [6, 11]");
    let backward = |layer: &Memory<Autodiff<B>>| {
        layer.forward(Tensor::<Autodiff<B>, 2>::ones([3, config.hidden_size], &Default::default())).sum().backward()
    };
    let gradients = backward(&layer);
    let forgetful = Trainer::new(TrainerConfig::new(1)).step(0.1, Forgetful { memory: layer.clone() }, gradients);
    let error = forgetful.unwrap_err().to_string();
    assert_eq!(
        error,
        "number of memory layers that MemoryModel::memories lists is 0, expected all of the model's, each once"
    );
    // The sparse part of the first pass is gone when the second has been taken.
    let (first, second) = (backward(&layer), backward(&layer));
    let (mut trainer, mut model) = (Trainer::new(TrainerConfig::new(1)), One { memory: layer });
    trainer.accumulate(&mut model, second).unwrap();
    let error = trainer.step(0.1, model, first).unwrap_err().to_string();
    assert!(error.starts_with("the sparse part of these gradients is gone"), "{error}");
}

thread_local! {
    /// What was told in this thread since it began to listen.
    static HEARD: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Listens to this project in every thread from the first time on: a listener of one thread's own may miss what is told while another's
/// comes or goes.
struct Listener;

impl tracing::Subscriber for Listener {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("ultramem")
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        HEARD.with_borrow_mut(|heard| {
            let Some(heard) = heard else { return };
            let mut text = String::new();
            event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
                text += &format!("{} {value:?} ", field.name());
            });
            heard.push(text);
        });
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// How often `what` is told in `run`, in this thread.
fn told<T>(what: &str, run: impl FnOnce() -> T) -> (usize, T) {
    static LISTENS: Once = Once::new();
    LISTENS.call_once(|| tracing::subscriber::set_global_default(Listener).unwrap());
    HEARD.set(Some(Vec::new()));
    let result = run();
    let count = HEARD.take().unwrap().iter().filter(|text| text.contains(what)).count();
    (count, result)
}

/// A loss that hangs on every weight.
fn loss<B: MemoryBackend>(memory: &Memory<B>, seed: u64) -> Tensor<B, 1> {
    let config = memory.config();
    memory.forward(tensor::<B>(&random_input(config, 9, seed), config.hidden_size)).square().sum()
}

fn one<B: MemoryBackend>(kind: Kind, seed: u64) -> One<B> {
    One { memory: memory(&small(kind), seed, true).0 }
}

fn trainer<B: MemoryBackend>() -> Trainer<Autodiff<B>, One<Autodiff<B>>> {
    Trainer::new(TrainerConfig::new(10))
}

/// An error gives the model back as it was, and the gradients wait: the next try does what the first would have done.
fn an_error_gives_the_model_back<B: MemoryBackend>() {
    let train = |learning_rates: [f64; 2]| {
        let (mut trainer, model) = (trainer::<B>(), one::<Autodiff<B>>(Kind::UltraMem, 6));
        let gradients = loss(&model.memory, 1).backward();
        let refused = trainer.step(learning_rates[0], model, gradients);
        let model = match refused {
            Ok((model, _)) => model,
            Err(refused) => {
                assert_eq!(refused.to_string(), "learning rate is NaN, expected a finite number");
                assert!(weights_of(&refused.model.memory) == weights_of(&one::<B>(Kind::UltraMem, 6).memory));
                assert_eq!(trainer.steps(), 0);
                trainer.apply(learning_rates[1], refused.model).unwrap().0
            }
        };
        assert_eq!(trainer.steps(), 1);
        weights_of(&model.memory)
    };
    assert!(train([f64::NAN, 0.01]) == train([0.01, 0.0]));
}

/// Two layers.
#[derive(Module, Debug)]
struct Two<B: Backend> {
    first: Memory<B>,
    second: Memory<B>,
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for Two<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        vec![&mut self.first, &mut self.second]
    }
}

/// Where the second layer's gradient is gone, the first layer's is not taken either, dense or sparse.
fn accumulate_takes_all_or_nothing<B: MemoryBackend>() {
    let config = small(Kind::UltraMem);
    let mut model = Two { first: memory::<Autodiff<B>>(&config, 1, true).0, second: memory(&config, 2, true).0 };
    let both = (loss(&model.first, 3) + loss(&model.second, 3)).backward();
    let second = loss(&model.second, 4).backward();
    let mut trainer = Trainer::new(TrainerConfig::new(10));
    let error = trainer.accumulate(&mut model, both).unwrap_err().to_string();
    assert!(error.starts_with("the sparse part of these gradients is gone"), "{error}");
    assert!(format!("{:?}", model.first).contains("Pending(1)"));
    let (model, report) = trainer.step(0.01, model, second).unwrap();
    assert!(report.done);
    assert!(weights_of(&model.first) == weights_of(&memory::<B>(&config, 1, true).0));
    assert!(weights_of(&model.second)[Weight::Values] != weights_of(&memory::<B>(&config, 2, true).0)[Weight::Values]);
}

/// A record says whose state it is: of what rule and what table. Its steps may be past 2³².
fn records_go_where_they_belong<B: MemoryBackend>() {
    let mut saved = trainer::<B>();
    let model = step::<B>(&mut saved, one(Kind::ProductKey, 6), 1);
    let rows = model.memory.config().rows();
    let other = trainer::<B>().with_rule(Rule::Adagrad { eps: 1e-8 }).load_record(saved.to_record());
    let error = other.err().unwrap().to_string();
    assert!(error.ends_with("rule is Adam, expected Adagrad"), "{error}");
    let refused = |model: One<Autodiff<B>>, change: fn(&mut TableRecord<Autodiff<B>>), expected: String| {
        let (before, mut record) = (weights_of(&model.memory), saved.to_record());
        change(&mut record.3[0]);
        let mut trainer = trainer::<B>().load_record(record).unwrap();
        let gradients = loss(&model.memory, 2).backward();
        let refused = trainer.step(0.01, model, gradients).unwrap_err();
        assert!(refused.to_string().ends_with(&expected), "{refused}");
        assert!(weights_of(&refused.model.memory) == before);
        refused.model
    };
    let model = refused(model, |record| record.rows += 1, format!("rows is {}, expected {rows}", rows + 1));
    let model = refused(model, |record| record.width = 1, "width is 1, expected 6".into());
    refused(one(Kind::ProductKey, 7), |_| (), "table is of no layer of the model, expected one".into());
    let mut record = saved.to_record();
    record.3[0].steps = (1 << 32) + 5;
    let mut trainer = trainer::<B>().load_record(record).unwrap();
    step::<B>(&mut trainer, model, 2);
    assert_eq!(trainer.to_record().3[0].steps, (1 << 32) + 6);
}

mod own {
    use burn::{
        module::{Module, Param},
        tensor::{Tensor, backend::Backend},
    };

    /// A user's own memory.
    #[derive(Module, Debug)]
    pub struct Memory<B: Backend> {
        pub values: Param<Tensor<B, 2>>,
    }
}

/// A model with a struct of its own that is called as ours is.
#[derive(Module, Debug)]
struct Namesake<B: Backend> {
    own: own::Memory<B>,
    memory: Memory<B>,
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for Namesake<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        vec![&mut self.memory]
    }
}

#[test]
fn layers_are_found_by_type() {
    let values = Param::from_tensor(Tensor::ones([2, 3], &Default::default()));
    let One { memory } = one::<Autodiff<Plain>>(Kind::UltraMem, 6);
    let model = Namesake { own: own::Memory { values }, memory };
    let gradients = (loss(&model.memory, 1) + model.own.values.val().sum()).backward();
    let (model, report) = Trainer::new(TrainerConfig::new(10)).step(0.01, model, gradients).unwrap();
    assert!(report.done && numbers(model.own.values.val()).iter().all(|&x| x < 1.0));
}

/// A clone and a record stay as they were when the model goes on. A table that somebody else holds is copied once, one that nobody
/// holds never.
fn a_clone_is_a_copy<B: MemoryBackend>() {
    let mut trainer = trainer::<B>();
    let model = step::<B>(&mut trainer, one(Kind::UltraMem, 6), 0);
    let mut step = |model, seed| told("is copied", || step::<B>(&mut trainer, model, seed));
    let (copies, model) = step(model, 1);
    assert_eq!(copies, 0, "nobody else holds the table");
    let (best, record) = (model.clone(), model.clone().into_record());
    let kept = weights_of(&model.memory);
    let (copies, model) = step(model, 2);
    assert_eq!(copies, 1);
    let (copies, model) = step(model, 3);
    assert_eq!(copies, 0);
    assert!(weights_of(&model.memory)[Weight::Values] != kept[Weight::Values]);
    assert!(weights_of(&best.memory) == kept);
    assert!(weights_of(&one::<Autodiff<B>>(Kind::UltraMem, 9).load_record(record).memory) == kept);
}

/// A layer that was made of the model is a copy, too.
#[test]
fn a_layer_is_a_copy() {
    let mut trainer = trainer::<Plain>();
    let model = step::<Plain>(&mut trainer, one(Kind::UltraMem, 6), 0);
    let (layer, kept) = (model.memory.layer(&Default::default()).unwrap(), weights_of(&model.memory));
    let (copies, _model) = told("is copied", || step::<Plain>(&mut trainer, model, 1));
    assert_eq!(copies, 1);
    assert!(layer.read_weights().unwrap() == kept);
}

/// One thread trains, another runs a clone over and over: it finds the same numbers every time, even in what it has only enqueued when it
/// lets the clone go.
fn a_clone_in_another_thread_never_changes<B: MemoryBackend>() {
    let (send, receive) = std::sync::mpsc::sync_channel::<Memory<B>>(1);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for memory in receive {
                let input = tensor::<B>(&random_input(memory.config(), 9, 5), memory.config().hidden_size);
                let expected = numbers(memory.forward(input.clone()));
                for _ in 0..4 {
                    assert_eq!(numbers(memory.forward(input.clone())), expected);
                }
                let last = memory.forward(input);
                drop(memory);
                assert_eq!(numbers(last), expected);
            }
        });
        let (mut trainer, mut model) = (trainer::<B>(), one::<Autodiff<B>>(Kind::UltraMem, 6));
        for seed in 0..24 {
            if seed % 3 == 0 {
                send.send(model.valid().memory).unwrap();
            }
            model = step::<B>(&mut trainer, model, seed);
        }
        drop(send);
    });
}

/// A sparse layer in the hands of one of Burn's own optimisers: said once, and no more than one pass's gradient waits.
fn a_gradient_that_nobody_takes_is_told_once<B: MemoryBackend>() {
    let mut model = one::<Autodiff<B>>(Kind::UltraMem, 6);
    let mut optimiser = AdamWConfig::new().init::<Autodiff<B>, One<Autodiff<B>>>();
    let (count, ()) = told("given to nobody", || {
        for seed in 0..4 {
            let gradients = (loss(&model.memory, seed) + loss(&model.memory, seed + 9)).backward();
            let gradients = GradientsParams::from_grads(gradients, &model);
            model = optimiser.step(0.01, model.clone(), gradients);
            assert!(format!("{:?}", model.memory).contains("Pending(1)"));
        }
    });
    assert_eq!(count, 1);
}

const ADAM: Rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };

fn adam<B: MemoryBackend>() -> burn::optim::adaptor::OptimizerAdaptor<burn::optim::AdamW, One<Autodiff<B>>, Autodiff<B>>
{
    AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.95).with_epsilon(1e-8).with_weight_decay(0.01).init()
}

/// Burn's AdamW within a `SparseOptimizer` does what the trainer does, with two passes a step.
fn sparse_optimizer_is_the_trainer<B: MemoryBackend>() {
    let trained = {
        let (mut trainer, mut model) = (trainer::<B>(), one::<Autodiff<B>>(Kind::UltraMem, 6));
        for seed in [1, 3] {
            let gradients = loss(&model.memory, seed).backward();
            trainer.accumulate(&mut model, gradients).unwrap();
            let gradients = loss(&model.memory, seed + 1).backward();
            model = trainer.step(0.01, model, gradients).unwrap().0;
        }
        weights_of(&model.memory)
    };
    let mut model = one::<Autodiff<B>>(Kind::UltraMem, 6);
    let optimiser = SparseOptimizer::new(adam::<B>(), ADAM, &mut model).unwrap();
    let mut optimiser = optimiser.with_value_rate(4.0, 10).with_clip(1.0);
    let (count, ()) = told("given to nobody", || {
        for seed in [1, 3] {
            let mut accumulator = GradientsAccumulator::new();
            for seed in [seed, seed + 1] {
                let gradients = loss(&model.memory, seed).backward();
                accumulator.accumulate::<Autodiff<B>>(&model, GradientsParams::from_grads(gradients, &model));
            }
            model = optimiser.step(0.01, model.clone(), accumulator.grads());
        }
    });
    assert_eq!(count, 0);
    assert!(weights_of(&model.memory) == trained);
}

/// `SparseTables` by hand beside Burn's AdamW does what `SparseOptimizer` does.
fn sparse_tables_go_beside_an_optimiser<B: MemoryBackend>() {
    let rule = Rule::Adagrad { eps: 1e-8 };
    let (mut model, mut tables, mut optimiser) =
        (one::<Autodiff<B>>(Kind::UltraMem, 6), SparseTables::new(rule), adam::<B>());
    for seed in 0..2 {
        let gradients = loss(&model.memory, seed).backward();
        tables.take(&mut model, &gradients).unwrap();
        assert!(tables.norm(&model).unwrap() > 0.0);
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimiser.step(0.01, model, gradients);
        model.memory.follow_cores().unwrap();
        tables.step(&mut model, 0.01, 1.0).unwrap();
        assert_eq!(tables.norm(&model).unwrap(), 0.0);
    }
    let by_hand = weights_of(&model.memory);
    let mut model = one::<Autodiff<B>>(Kind::UltraMem, 6);
    let mut optimiser = SparseOptimizer::new(adam::<B>(), rule, &mut model).unwrap().with_auxiliary(0.0);
    for seed in 0..2 {
        let gradients = GradientsParams::from_grads(loss(&model.memory, seed).backward(), &model);
        model = optimiser.step(0.01, model, gradients);
    }
    assert!(weights_of(&model.memory) == by_hand);
}

/// No token: an empty output, gradients of zeros, a step that moves no value.
fn an_empty_batch_is_empty<B: MemoryBackend>() {
    for sparse in [true, false] {
        let config = small(Kind::UltraMem);
        let start = || One { memory: memory::<Autodiff<B>>(&config, 6, sparse).0 };
        let empty = |memory: &Memory<Autodiff<B>>| {
            let input = Tensor::<Autodiff<B>, 3>::empty([0, 4, config.hidden_size], &Default::default());
            memory.forward(input)
        };
        let model = start();
        assert_eq!(empty(&model.memory).dims(), [0, 4, config.hidden_size]);
        let plain = Tensor::<B, 2>::empty([0, config.hidden_size], &Default::default());
        assert_eq!(model.valid().memory.forward(plain).dims(), [0, config.hidden_size]);
        let output = empty(&model.memory);
        // Burn's own `sum` can't go back through no number.
        let gradients = output.backward();
        let (model, report) = trainer::<B>().step(0.01, model, gradients).unwrap();
        assert!(report.done && report.gradient_norm < 1e-3, "{report:?}");
        let found = weights_of(&model.memory);
        assert!(found[Weight::Values] == weights_of(&start().memory)[Weight::Values]);
        assert!(found[Weight::Keys].to_f32().iter().all(|x| x.is_finite()));
    }
}

/// Layers that share tables: one gradient and one state for all of them, no copy of the table, and the update is the oracle's.
#[test]
fn layers_that_share_a_table_train_it_once() {
    type Learning = Autodiff<Plain>;
    let device = Default::default();
    let config = UltraMemV2Config::new(12, 3, 6, 5, 6, 4, 4).with_share_ratio(0.6).with_key_expand_time(2);
    let start = config.init::<Learning>(&device).unwrap();
    let weights = |model: &UltraMemV2<Learning>, place: usize| {
        model.layers()[place].layer_with(model.owner(place), &device).unwrap().read_weights().unwrap()
    };
    let configs: Vec<_> = (0..3).map(|place| config.dimensions(place).unwrap()).collect();
    let (input, grad) = (random_input(&configs[0], 5, 1), random_input(&configs[0], 5, 2));
    // The oracle's gradients of the table, of all layers together.
    let mut expected =
        [Weight::Values, Weight::PreValues].map(|table| vec![0.0; table.shape(&configs[0]).iter().product()]);
    for (place, config) in configs.iter().enumerate() {
        let weights = weights(&start, place);
        let slots = reference::forward(config, &weights, &input).unwrap().slots;
        let found = reference::backward(config, &weights, &input, &slots, &grad).unwrap();
        for (sum, table) in expected.iter_mut().zip([Weight::Values, Weight::PreValues]) {
            sum.iter_mut().zip(found.dense(config, table)).for_each(|(sum, g)| *sum += g);
        }
    }
    let x = tensor::<Learning>(&input, 12);
    let loss = (0..3)
        .map(|place| (start.try_forward(place, x.clone()).unwrap() * tensor(&grad, 12)).sum())
        .reduce(|a, b| a + b)
        .unwrap();
    let before = [Weight::Values, Weight::PreValues].map(|table| weights(&start, 0).numbers(table));
    let mut tables = SparseTables::<Learning>::new(Rule::Sgd { momentum: 0.0 });
    let mut model = start;
    tables.take(&mut model, &loss.backward()).unwrap();
    tables.step(&mut model, 0.5, 1.0).unwrap();
    for place in 0..3 {
        let after = weights(&model, place);
        for ((table, before), gradient) in [Weight::Values, Weight::PreValues].into_iter().zip(&before).zip(&expected) {
            let expected: Vec<f64> = before.iter().zip(gradient).map(|(&v, g)| f64::from(v) - 0.5 * g).collect();
            let off = relative_l2(&after.numbers(table), &expected);
            assert!(off < 1e-5, "layer {place}, {table:?}: {off}");
        }
    }
    assert_eq!(tables.to_record().len(), 2, "a state for the values, and one for the pre-values");
    let mut trainer = Trainer::new(TrainerConfig::new(10));
    let loss = model.try_forward(2, x).unwrap().square().mean();
    let (_, report) = trainer.step(1e-3, model, loss.backward()).unwrap();
    assert!(report.done && report.auxiliary_loss == 0.0);
}
