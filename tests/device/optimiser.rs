//! Sparse updates of the table against the oracle's, and their way through a file.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng, rngs::StdRng, seq::index};
use ultramem::Weight;
use ultramem::kernels::optimiser::{Optimiser, Rounding, Rule, Step};
use ultramem::kernels::{from_f32, from_u32};
use ultramem::{Checkpoint, ElementType, HostTensor, RowGradients, Tensor, ValueTable, reference};

use crate::common::random_input;
use crate::device::{Case, Client, Layer, client, read_u32};
use crate::pages::{in_pages, paged};
use crate::shapes::{plain, random_case};

type Runtime = crate::device::Adapter;
type Rows = BTreeMap<usize, Vec<f64>>;

const ADAM: Rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: false };
const ADAM_W: Rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
const RULES: [Rule; 5] =
    [Rule::Sgd { momentum: 0.0 }, Rule::Sgd { momentum: 0.9 }, Rule::Adagrad { eps: 1e-8 }, ADAM, ADAM_W];

/// Gradients of some rows, on the device with NaN in what is not set, and on the host.
fn some_rows(client: &Client, rows: usize, width: usize, rng: &mut StdRng) -> (RowGradients<Runtime>, Rows) {
    let (used, capacity) = (rows / 3 + 1, rows);
    let mut listed: Vec<_> = index::sample(rng, rows, used).into_iter().collect();
    listed.sort_unstable();
    let gradients: Rows = listed
        .iter()
        .map(|&row| (row, (0..width).map(|_| f64::from(rng.random_range(-1.0..1f32))).collect()))
        .collect();
    let mut numbers: Vec<f32> = gradients.values().flatten().map(|&g| g as f32).collect();
    numbers.resize(capacity * width, f32::NAN);
    let mut places: Vec<u32> = listed.iter().map(|&row| row as u32).collect();
    places.resize(capacity, 0);
    (row_gradients(client, &places, used, &numbers, rows), gradients)
}

fn row_gradients(
    client: &Client,
    rows: &[u32],
    used: usize,
    numbers: &[f32],
    table_rows: usize,
) -> RowGradients<Runtime> {
    let width = numbers.len() / rows.len();
    let listed = from_u32(client, &[rows.len()], rows).unwrap();
    let count = from_u32(client, &[1], &[used as u32]).unwrap();
    let gradients = from_f32(client, &[rows.len(), width], numbers).unwrap();
    RowGradients::new(client, &listed, &count, &gradients, table_rows).unwrap()
}

fn download(client: &Client, table: &Tensor<Runtime>, dtype: ElementType) -> Vec<f32> {
    let bytes = client.read_one(table.handle.clone()).unwrap().to_vec();
    HostTensor::new(table.shape().to_vec(), dtype, bytes).unwrap().to_f32()
}

/// Five steps of a rule over other rows each time, against the oracle's; rows that no step may change keep their bits. The table lies in
/// pages of `page_rows` rows.
fn hold(rule: Rule, dtype: ElementType, [rows, width]: [usize; 2], masked: bool, page_rows: usize) {
    let (client, rng) = (client(), &mut StdRng::seed_from_u64(rows as u64));
    let numbers: Vec<f32> = (0..rows * width).map(|_| rng.random_range(-1.0..1.0)).collect();
    let before = HostTensor::from_f32([rows, width], &numbers).unwrap();
    let before = before.cast(dtype);
    let table = ValueTable::upload_in_pages(&client, &before, dtype, page_rows).unwrap();
    let (page_rows, mut table) = (table.page_rows(), table.pages().to_vec());
    let mut expected: Rows =
        before.to_f32().chunks(width).map(|row| row.iter().map(|&x| x.into()).collect()).enumerate().collect();
    let words: Vec<u32> = (0..rows.div_ceil(32)).map(|_| if masked { rng.random() } else { u32::MAX }).collect();
    let mask = from_u32(&client, &[words.len()], &words).unwrap();
    let may_change = |row: usize| words[row / 32] >> (row % 32) & 1 == 1;
    let (mut optimiser, mut oracle) = (
        Optimiser::new(&client, rule, &page_rows, width).unwrap(),
        reference::Optimiser::new(rule).with_rounding(0, dtype),
    );
    let mut changed = vec![false; rows];
    for step in 0..5 {
        let (gradients, on_host) = some_rows(&client, rows, width, rng);
        let (learning_rate, scale) = (0.1 / (step + 1) as f32, 0.5);
        let how = Step { learning_rate, scale, mask: masked.then_some(&mask) };
        optimiser.step(&client, &mut table, &gradients, &how).unwrap();
        oracle.step(&mut expected, &on_host, learning_rate.into(), scale.into(), may_change);
        on_host.keys().filter(|&&row| may_change(row)).for_each(|&row| changed[row] = true);
    }
    let found: Vec<f32> = table.iter().flat_map(|page| download(&client, page, dtype)).collect();
    let tolerance = if dtype == ElementType::F32 { 1e-5 } else { 2e-3 };
    for (row, (found, before)) in found.chunks(width).zip(before.to_f32().chunks(width)).enumerate() {
        if changed[row] {
            crate::device::assert_close(&format!("{rule:?}, row {row}"), found, &expected[&row], tolerance);
        } else {
            assert_eq!(found, before, "{rule:?}: row {row} was not to change");
        }
    }
}

#[test]
fn every_rule_agrees_with_the_oracle() {
    for rule in RULES {
        hold(rule, ElementType::F32, [77, 12], false, 77);
        hold(rule, ElementType::F32, [40, 5], true, 40);
        hold(rule, ElementType::F16, [33, 8], true, 33);
        hold(rule, ElementType::F32, [77, 12], true, 32);
        hold(rule, ElementType::F16, [40, 8], false, 13);
    }
}

/// Three backward passes: what they list in common is added up, a NaN stays in its row, and two runs give the same bits.
#[test]
fn gradients_of_several_passes_add_up() {
    let (client, rng) = (client(), &mut StdRng::seed_from_u64(5));
    for (rows, width) in [(77, 12), (40, 5), (1, 1)] {
        let (mut parts, mut expected) = (Vec::new(), vec![0.0; rows * width]);
        for _ in 0..3 {
            let (on_device, on_host) = some_rows(&client, rows, width, rng);
            for (row, gradient) in on_host {
                gradient.iter().enumerate().for_each(|(c, g)| expected[row * width + c] += g);
            }
            parts.push(on_device);
        }
        let sum = || {
            let sum = RowGradients::sum(&client, &parts, rows).unwrap();
            download(&client, &sum.dense(&client, rows).unwrap(), ElementType::F32)
        };
        let found = sum();
        crate::device::assert_close("sum", &found, &expected, 1e-6);
        assert_eq!(found, sum());
    }
    let (part, on_host) = some_rows(&client, 9, 4, rng);
    let (&first, _) = on_host.first_key_value().unwrap();
    let nan = row_gradients(&client, &[first as u32], 1, &[f32::NAN; 4], 9);
    let sum = RowGradients::sum(&client, &[part, nan], 9).unwrap().dense(&client, 9).unwrap();
    for (row, found) in download(&client, &sum, ElementType::F32).chunks(4).enumerate() {
        assert_eq!(found.iter().all(|x| x.is_nan()), row == first, "row {row}: {found:?}");
    }
    // Another table's gradient is refused.
    let (other, _) = some_rows(&client, 40, 4, rng);
    let refused = RowGradients::sum(&client, &[other], 7).err().unwrap().to_string();
    assert_eq!(refused, "rows of a gradient's table: 40, expected 7");
    let (wide, _) = some_rows(&client, 9, 5, rng);
    let (part, _) = some_rows(&client, 9, 4, rng);
    let refused = RowGradients::sum(&client, &[part, wide], 9).err().unwrap().to_string();
    assert_eq!(refused, "row gradients has shape [9, 5], expected [9, 4]");
    assert!(RowGradients::<Runtime>::sum(&client, &[], 9).is_err());
}

/// Rows in any order, listed again, beyond the table and unset: each row of the table is listed once, and no other moves.
#[test]
fn lists_of_rows_become_rows_of_the_table() {
    let client = client();
    let rows = [5, 2, 9, 5, u32::MAX, 0, 6];
    let numbers: Vec<f32> = (0..14).map(|at| at as f32 + 1.0).collect();
    let listed = row_gradients(&client, &rows, 5, &numbers, 9);
    assert_eq!(read_u32(&client, listed.count()), [2]);
    assert_eq!(read_u32(&client, listed.rows())[..2], [2, 5]);
    let dense = download(&client, &listed.dense(&client, 9).unwrap(), ElementType::F32);
    let mut expected = vec![0.0; 18];
    expected[4..6].copy_from_slice(&[3.0, 4.0]);
    expected[10..12].copy_from_slice(&[1.0 + 7.0, 2.0 + 8.0]);
    assert_eq!(dense, expected);
    let mut table = [from_f32(&client, &[9, 2], &[1.0; 18]).unwrap()];
    let mut optimiser = Optimiser::new(&client, ADAM_W, &[9], 2).unwrap();
    let both = RowGradients::sum(&client, &[listed.clone(), listed], 9).unwrap();
    optimiser.step(&client, &mut table, &both, &Step::new(0.1)).unwrap();
    for (row, found) in download(&client, &table[0], ElementType::F32).chunks(2).enumerate() {
        assert_eq!(found.iter().all(|&x| x != 1.0), row == 2 || row == 5, "row {row}: {found:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (client, rng) = (client(), &mut StdRng::seed_from_u64(1));
    let (gradients, _) = some_rows(&client, 8, 4, rng);
    let mut table = [from_f32(&client, &[8, 4], &[0.0; 32]).unwrap()];
    let mut narrow = [from_f32(&client, &[8, 2], &[0.0; 16]).unwrap()];
    let words = from_u32(&client, &[2], &[0; 2]).unwrap();
    let mut optimiser = Optimiser::new(&client, ADAM, &[8], 4).unwrap();
    let mut other = Optimiser::new(&client, ADAM, &[9], 4).unwrap();
    let rate = |learning_rate| Step::new(learning_rate);
    let masked = Step { mask: Some(&words), ..rate(0.1) };
    let refused = |result: Result<(), ultramem::kernels::Error>| result.unwrap_err().to_string();
    assert_eq!(
        refused(optimiser.step(&client, &mut narrow, &gradients, &rate(0.1))),
        "table has shape [8, 2], expected [8, 4]"
    );
    assert_eq!(
        refused(other.step(&client, &mut table, &gradients, &rate(0.1))),
        "first_moment has shape [9, 4], expected [8, 4]"
    );
    assert_eq!(
        refused(optimiser.step(&client, &mut table, &gradients, &rate(f32::NAN))),
        "learning_rate is NaN, expected a finite number"
    );
    assert_eq!(refused(optimiser.step(&client, &mut table, &gradients, &masked)), "mask has shape [2], expected [1]");
    assert_eq!(optimiser.steps(), 0, "a refused step is not counted");
    let wrong = Rule::Sgd { momentum: 1.5 };
    let message = Optimiser::<Runtime>::new(&client, wrong, &[8], 4).err().unwrap().to_string();
    assert_eq!(message, "momentum is 1.5, expected 0 or more and less than 1");
    let mut halves = [from_f32(&client, &[4, 4], &[0.0; 16]).unwrap(), from_f32(&client, &[4, 4], &[0.0; 16]).unwrap()];
    let paged = refused(optimiser.step(&client, &mut halves, &gradients, &rate(0.1)));
    assert_eq!(paged, "pages of the table: 2, expected 1");
    let none = Optimiser::<Runtime>::new(&client, ADAM, &[], 4).err().unwrap().to_string();
    assert!(none.contains("pages of a table"), "{none}");
    let state = [halves.to_vec(), halves.to_vec()];
    assert_eq!(refused(optimiser.restore(3, &state)), "pages of the optimiser's state: 2, expected 1");
    assert_eq!(refused(optimiser.restore(3, &[])), "tensors of the optimiser's state: 0, expected 2");
}

/// Two steps, a file, two more steps: the same bits as four steps, whatever pages the table lies in.
#[test]
fn training_goes_on_from_a_file() {
    goes_on(random_case(&plain(), 20, ElementType::F32, 8));
}

#[test]
fn training_in_pages_goes_on_from_a_file() {
    goes_on(in_pages(random_case(&plain(), 20, ElementType::F32, 8), 50));
}

fn goes_on(mut case: Case) {
    let page_rows = case.layer.table().page_rows();
    let input = case.layer.upload(&case.input).unwrap();
    let grad_output = case.layer.upload(&random_input(case.layer.config(), 20, 9)).unwrap();
    let train = |layer: &mut Layer, optimiser: &mut Optimiser<Runtime>, steps: usize| {
        for _ in 0..steps {
            let (_, saved) = layer.forward_saving(&input).unwrap();
            let gradients = layer.backward(&input, &saved, &grad_output).unwrap();
            layer.update_values(optimiser, &gradients.values, &Step::new(0.05)).unwrap();
        }
        layer.read_weights().unwrap().numbers(Weight::Values)
    };
    let mut optimiser = case.layer.value_optimiser(ADAM_W).unwrap();
    let halfway = train(&mut case.layer, &mut optimiser, 2);
    let weights = case.layer.read_weights().unwrap();
    let saved = case.layer.read_state(&optimiser).unwrap();
    let expected = train(&mut case.layer, &mut optimiser, 2);
    assert_ne!(halfway, expected);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("halfway.safetensors");
    let state: Vec<_> = saved
        .tensors
        .into_iter()
        .map(|(name, tensor)| (name, ultramem::checkpoint::FileTensor::Floats(tensor)))
        .collect();
    let named: Vec<_> = state.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    Checkpoint::write(&path, case.layer.config(), &weights, &named, &[saved.metadata].into()).unwrap();

    let file = Checkpoint::open(&path).unwrap();
    let layer = Layer::new(&client(), file.config().clone(), &file.weights().unwrap(), ElementType::F32).unwrap();
    let mut layer = paged(layer, page_rows[0]);
    assert_eq!(layer.read_weights().unwrap().numbers(Weight::Values), halfway);
    let mut optimiser = layer.restore_state(&file, ADAM_W).unwrap();
    assert_eq!(optimiser.steps(), 2);
    assert_eq!(train(&mut layer, &mut optimiser, 2), expected);
    let other = layer.restore_state(&file, Rule::Adagrad { eps: 1e-8 }).err().unwrap().to_string();
    assert!(other.contains("optimiser.values.squares"), "{other}");
}

/// A table whose every row is used, and a gradient of ones for it.
fn all_rows(client: &Client, [rows, width]: [usize; 2], number: f32, dtype: ElementType) -> AllRows {
    all_rows_with(client, [rows, width], number, dtype, &vec![1.0; rows * width])
}

/// The same with another gradient.
fn all_rows_with(
    client: &Client,
    [rows, width]: [usize; 2],
    number: f32,
    dtype: ElementType,
    gradients: &[f32],
) -> AllRows {
    let numbers = vec![number; rows * width];
    let values = HostTensor::from_f32([rows, width], &numbers).unwrap();
    let table = ValueTable::upload(client, &values, dtype).unwrap().pages().to_vec();
    let gradients = row_gradients(client, &(0..rows as u32).collect::<Vec<_>>(), rows, gradients, rows);
    (table, gradients)
}

type AllRows = (Vec<Tensor<Runtime>>, RowGradients<Runtime>);

fn mean(numbers: &[f32]) -> f64 {
    numbers.iter().map(|&x| f64::from(x)).sum::<f64>() / numbers.len() as f64
}

/// 10,000 steps of 1e-6 at 0.02, where half of f16's last place is 8e-6: they vanish when rounded to the nearest, and move the table by 1e-2
/// on average when rounded by chance, by the same bits in each run, which another seed changes.
#[test]
fn small_steps_of_a_half_precision_table_add_up() {
    let (client, dtype, rule) = (client(), ElementType::F16, Rule::Sgd { momentum: 0.0 });
    let trained = |rounding, steps| {
        let (mut table, gradients) = all_rows(&client, [32, 32], 0.02, dtype);
        let start = mean(&download(&client, &table[0], dtype));
        let mut optimiser = Optimiser::new(&client, rule, &[32], 32).unwrap().with_rounding(rounding);
        for _ in 0..steps {
            optimiser.step(&client, &mut table, &gradients, &Step::new(1e-6)).unwrap();
        }
        let numbers = download(&client, &table[0], dtype);
        (start - mean(&numbers), numbers)
    };
    let (moved, _) = trained(Rounding::default(), 10_000);
    assert!((moved - 1e-2).abs() < 2e-4, "{moved}");
    assert_eq!(trained(Rounding::Nearest, 100).0, 0.0);
    let [first, again, other] = [0, 0, 1].map(|seed| trained(Rounding::Stochastic { seed }, 100).1);
    assert!(first == again && first != other);
}

/// Signs, subnormal numbers, the largest, what is not finite: the oracle's number or, where f32 and f64 round otherwise, its neighbour.
#[test]
fn chance_rounds_to_a_neighbour() {
    let (client, dtype) = (client(), ElementType::F16);
    let numbers = [0.02, -0.02, 3e-5, -3e-5, 6e-8, 1e-9, 0.0, 60000.0, -65519.0, 65519.0, f32::INFINITY, f32::NAN];
    let (mut table, gradients) = all_rows_with(&client, [1, 12], 0.0, dtype, &numbers.map(|x| -x));
    let mut optimiser = Optimiser::new(&client, Rule::Sgd { momentum: 0.0 }, &[1], 12).unwrap();
    optimiser.step(&client, &mut table, &gradients, &Step::new(1.0)).unwrap();
    let mut oracle = reference::Optimiser::new(Rule::Sgd { momentum: 0.0 }).with_rounding(0, dtype);
    let mut expected: Rows = [(0, vec![0.0; 12])].into();
    let on_host: Rows = [(0, numbers.map(|x| f64::from(-x)).to_vec())].into();
    oracle.step(&mut expected, &on_host, 1.0, 1.0, |_| true);
    let found = download(&client, &table[0], dtype);
    for ((found, expected), number) in found.iter().zip(&expected[&0]).zip(numbers) {
        let same = f64::from(*found) == *expected || number.is_nan() && found.is_nan();
        assert!(same || number.abs() == 65519.0 && found.abs() == 65504.0, "{number}: {found}, {expected}");
    }
}

/// A clone of the table, of its optimiser and of the weights stays as it was when the other goes on; alone, a table keeps its buffer.
#[test]
fn a_clone_is_a_copy() {
    let client = client();
    let (mut table, gradients) = all_rows(&client, [8, 4], 1.0, ElementType::F32);
    let mut optimiser = Optimiser::new(&client, ADAM, &[8], 4).unwrap();
    let step = |optimiser: &mut Optimiser<Runtime>, table: &mut Vec<Tensor<Runtime>>| {
        optimiser.step(&client, table, &gradients, &Step::new(0.1)).unwrap();
        download(&client, &table[0], ElementType::F32)
    };
    step(&mut optimiser, &mut table);
    let (mut other, mut clone) = (optimiser.clone(), table.clone());
    let before = download(&client, &clone[0], ElementType::F32);
    let second = step(&mut optimiser, &mut table);
    let third = step(&mut optimiser, &mut table);
    assert!(before != second && second != third);
    assert_eq!(download(&client, &clone[0], ElementType::F32), before);
    assert_eq!(step(&mut other, &mut clone), second);
    assert_eq!(step(&mut other, &mut clone), third);
}
