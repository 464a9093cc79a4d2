//! The passes of a layer, counted: their launches are those of the pass, and counts follow from sizes.

use ultramem::kernels::optimiser::Rule;
use ultramem::{Dimensions, ElementType, Error, MemoryConfig, Weights};
use ultramem_offline::profile::passes::{Choices, Staged, Subject, Versus, hidden_states};
use ultramem_offline::profile::pipes::Pipe;
use ultramem_offline::profile::{Profile, Rates};
use ultramem_offline::trace::{Traced, Tracer, step, tracing_device};
use ultramem_offline::{Gpu, Target};
use ultramem_versus::{Design, Plan, Scale};

const TOKENS: usize = 128;
const HIDDEN: usize = 64;
const WIDTH: usize = 64;
/// Heads times slots of a head.
const ENTRIES: usize = TOKENS * 2 * 8;
const ADAM: Rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };

/// A layer whose slots have a row each.
fn config() -> MemoryConfig {
    let dimensions = Dimensions {
        hidden_size: HIDDEN,
        side_keys: 64,
        key_dim: 16,
        top_m: 8,
        value_dim: WIDTH,
        expansion: 1,
        ..Dimensions::default()
    };
    MemoryConfig::new(dimensions).unwrap()
}

fn with_subject<T>(input: &[f32], run: impl FnOnce(&Subject<'_>) -> T) -> T {
    let (config, rates) = (config(), Rates::of(Gpu::H100));
    let weights = Weights::random_without_tables(&config, 3);
    let (dtype, gpu) = (ElementType::F32, Gpu::H100);
    run(&Subject::new(&config, &weights, input, dtype, (gpu, &rates)))
}

fn drawn() -> Vec<f32> {
    hidden_states(HIDDEN, TOKENS, 5)
}

fn names(staged: &[Staged]) -> Vec<(&str, &str)> {
    staged.iter().map(|it| (it.stage, it.profile.kernel.as_str())).collect()
}

/// The launches of the given stages.
fn traced(traced: &[Traced], of: impl Fn(&str) -> bool) -> Vec<(&str, &str)> {
    traced.iter().filter(|it| of(it.stage)).map(|it| (it.stage, it.launch.kernel.entry.as_str())).collect()
}

fn kernel<'a>(staged: &'a [Staged], stage: &str, name: &str) -> &'a Profile {
    let found = staged.iter().find(|it| it.stage == stage && it.profile.kernel.starts_with(name));
    &found.unwrap_or_else(|| panic!("{stage} has no {name}")).profile
}

#[test]
fn launches_are_those_of_the_pass() {
    let device = tracing_device(Gpu::H100, Target::Cuda);
    let mut tracer = Tracer::new(&device, &config(), ElementType::F32).unwrap();
    let forward = tracer.forward(TOKENS, None).unwrap();
    let training = tracer.training(TOKENS, &[ADAM]).unwrap();
    with_subject(&drawn(), |subject| {
        assert_eq!(names(&subject.forward().unwrap()), traced(&forward, |_| true));
        let choices = subject.choices().unwrap();
        let backward = subject.backward(&choices).unwrap();
        assert_eq!(names(&backward), traced(&training, |stage| stage.ends_with("-backward")));
        let update = subject.update(&choices, ADAM).unwrap();
        assert_eq!(names(&update), traced(&training, |stage| stage == "update"));
        assert_eq!(update.len(), 1);
    });
}

#[test]
fn backwards_counts_follow_from_sizes() {
    with_subject(&drawn(), |subject| {
        let choices = subject.choices().unwrap();
        assert_eq!(choices.popularity().entries, ENTRIES);
        let backward = subject.backward(&choices).unwrap();
        // Slots are read, and for each of two sides a key and a query are written; and of 256 keys how many each block has of each.
        let list = kernel(&backward, "score-backward", "list_keys");
        assert_eq!(list.memory_bytes, (4 * ENTRIES + 2 * 2 * 4 * ENTRIES + 4 * 256 * list.cubes as usize) as f64);
        // A launch that writes whole numbers runs whole.
        let whole = |kernel: &str| ["locate", "count_k", "scatter"].iter().any(|name| kernel.starts_with(name));
        for Staged { profile, .. } in backward.iter().filter(|it| whole(&it.profile.kernel)) {
            assert_eq!(profile.counted as u64, profile.cubes, "{}", profile.kernel);
        }
    });
}

/// Of each used row its gradient and itself are moved, and its place in the list, eight of them a sector; once the number of rows.
#[test]
fn an_update_moves_the_used_rows() {
    with_subject(&drawn(), |subject| {
        let choices = subject.choices().unwrap();
        let used = choices.popularity().slots;
        assert!((2..ENTRIES).contains(&used), "{used}");
        let row = 4 * WIDTH;
        let update = |rule| subject.update(&choices, rule).unwrap().remove(0).profile;
        let (plain, adam) = (update(Rule::Sgd { momentum: 0.0 }), update(ADAM));
        assert_eq!(plain.memory_bytes as usize, 2 * row * used + 4 + 32 * used.div_ceil(8));
        // Two moments besides, each read and written.
        assert_eq!((adam.memory_bytes - plain.memory_bytes) as usize, 2 * row * used);
        assert_eq!((adam.cache_bytes - plain.cache_bytes) as usize, 4 * row * used);
    });
}

/// Blocks of 64 entries are summed whatever rows they belong to, and then the parts of rows that lie in several: where all tokens are alike, every
/// row's.
#[test]
fn tokens_that_are_all_alike_choose_the_same_rows() {
    let alike = drawn()[..HIDDEN].repeat(TOKENS);
    let sums = |choices: &Choices, subject: &Subject<'_>| {
        let backward = subject.backward(choices).unwrap();
        let issued = |name| {
            let profile = kernel(&backward, "expand-backward", name);
            profile.ptx[Pipe::Fma as usize].1
        };
        (issued("sum_rows"), issued("sum_blocks"))
    };
    let (rows_of_alike, blocks_of_alike) = with_subject(&alike, |subject| {
        let choices = subject.choices().unwrap();
        let found = choices.popularity();
        assert!(found.slots <= 16 && found.most >= TOKENS, "{found:?}");
        sums(&choices, subject)
    });
    let (rows, blocks) = with_subject(&drawn(), |subject| sums(&subject.choices().unwrap(), subject));
    assert!(rows_of_alike > rows, "{rows_of_alike} {rows}");
    assert!(blocks_of_alike <= blocks && blocks < 2.0 * blocks_of_alike, "{blocks} {blocks_of_alike}");
}

#[test]
fn lines_add_up_to_the_launch() {
    let forward = with_subject(&drawn(), |subject| subject.forward().unwrap());
    for Staged { profile, .. } in &forward {
        let sectors: f64 = profile.lines.iter().map(|line| line.sectors).sum();
        assert!((32.0 * sectors / profile.cache_bytes - 1.0).abs() < 1e-9, "{}", profile.kernel);
        let shared: f64 = profile.lines.iter().map(|line| line.shared_cycles).sum();
        assert!((shared - profile.shared_cycles).abs() < 1e-6 * shared.max(1.0), "{}", profile.kernel);
        for &(pipe, all) in &profile.machine {
            let of = |line: &ultramem_offline::profile::lines::Line| {
                line.machine.iter().find(|it| it.0 == pipe).map_or(0.0, |it| it.1)
            };
            let sum: f64 = profile.lines.iter().map(of).sum();
            assert!((sum - all).abs() <= 1e-6 * all.max(1.0), "{} {pipe}: {sum} of {all}", profile.kernel);
        }
        let dearest = &profile.lines[0];
        assert!(dearest.line > 0 && !dearest.text.is_empty() && !dearest.binds.is_empty(), "{dearest:?}");
        assert!(profile.lines.windows(2).all(|pair| pair[0].time >= pair[1].time));
    }
    let score = kernel(&forward, "score", "score");
    assert!(score.lines.iter().any(|line| line.sectors > 0.0 && line.text.contains('[')), "no line loads");
}

#[test]
fn versus_launches_what_a_decoding_step_does() {
    let scale = Scale { top_m: 8, ..Scale::block(256) };
    let rates = Rates::of(Gpu::H100);
    let (tokens, cached, dtype) = (256, 16, ElementType::BF16);
    let versus = Versus { scale, tokens, cached, dtype, gpu: Gpu::H100, rates: &rates };
    let staged = versus.step().unwrap();
    let of = |stages: &[&str]| -> Vec<&str> {
        let of_stage = |stage: &&str| names(&staged).into_iter().filter(|it| it.0 == *stage).collect::<Vec<_>>();
        stages.iter().flat_map(of_stage).map(|it| it.1).collect()
    };
    let device = tracing_device(Gpu::H100, Target::Cuda);
    for (design, stage) in [(Design::Dense, "dense"), (Design::Moe, "experts")] {
        let plan = Plan::new(design, &scale).unwrap();
        let step = step(&device, &plan, dtype, tokens, cached).unwrap();
        let step = traced(&step, |stage| stage == "step").into_iter().map(|it| it.1);
        let step: Vec<&str> = step.filter(|kernel| !kernel.starts_with("residual")).collect();
        assert_eq!(of(&["attention", stage]), step, "{design:?}");
    }
    // Keys and values of every position, and the new ones; query and output.
    let attention = kernel(&staged, "attention", "attention");
    let (row, positions) = (2 * 256 * tokens, cached);
    assert_eq!(attention.memory_bytes, (row * (2 * positions + 2 + 2)) as f64);
}

#[test]
fn an_input_that_is_none_is_refused_with_its_numbers() {
    for (input, words) in [(vec![0.5; HIDDEN + 1], "65 numbers"), (Vec::new(), "no token")] {
        let error: Error = with_subject(&input, |subject| subject.choices().unwrap_err());
        assert!(error.to_string().contains(words), "{error}");
        let error = with_subject(&input, |subject| subject.forward().unwrap_err());
        assert!(error.to_string().contains(words), "{error}");
    }
}

/// Choices are of so many tokens; others are none.
#[test]
fn choices_of_other_tokens_are_refused() {
    let choices = with_subject(&drawn(), |subject| subject.choices().unwrap());
    let fewer = &drawn()[..HIDDEN * (TOKENS / 2)];
    let error = with_subject(fewer, |subject| subject.backward(&choices).unwrap_err());
    let bytes = (4 * TOKENS * 2 * 2 * 8).to_string();
    assert!(error.to_string().contains(&bytes), "{error}");
}
