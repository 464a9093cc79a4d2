//! Products on matrix units against sums in f64: shapes that tiles, stages and whole loads do not fill, factors of unlike types, a depth cut
//! into parts; on devices that watch each launch. And how they are cut on an H100: no multiprocessor idle where there is work for it.

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::future::block_on;
use ultramem::kernels::launch::Device;
use ultramem::kernels::linear::{MatrixPlans, MatrixSizes, ProjectStrategy, project};
use ultramem::kernels::query::{Map, query_backward};
use ultramem::{ElementType, HostTensor, Tensor};
use ultramem_offline::{Gpu, OfflineDevice, OfflineRuntime};

const MATRIX: ProjectStrategy = ProjectStrategy::Matrix;

/// A matrix on the device and, rounded as it is there, on the host.
struct Factor {
    host: Vec<f64>,
    tensor: Tensor<OfflineRuntime>,
}

fn factor(client: &ComputeClient<OfflineRuntime>, shape: [usize; 2], seed: usize, dtype: ElementType) -> Factor {
    let numbers: Vec<f32> =
        (0..shape[0] * shape[1]).map(|at| ((at * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect();
    let wide = HostTensor::from_f32(shape, &numbers).unwrap();
    let host = wide.cast(dtype);
    let handle = client.create_from_slice(host.bytes());
    let tensor = Tensor::new_contiguous(client, shape.to_vec(), handle, dtype.storage());
    Factor { host: host.to_f32().into_iter().map(f64::from).collect(), tensor }
}

fn read(client: &ComputeClient<OfflineRuntime>, tensor: &Tensor<OfflineRuntime>) -> Vec<f32> {
    let count = tensor.shape().iter().product::<usize>() * tensor.dtype.size();
    let bytes = client.read_one(tensor.handle.clone()).unwrap()[..count].to_vec();
    HostTensor::new(tensor.shape().to_vec(), ElementType::from_storage(tensor.dtype).unwrap(), bytes).unwrap().to_f32()
}

/// Relative to the norm of what is expected.
fn error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let squares: f64 = found.iter().zip(expected).map(|(&f, e)| (f64::from(f) - e).powi(2)).sum();
    (squares / expected.iter().map(|e| e * e).sum::<f64>()).sqrt()
}

fn assert_clean(device: &OfflineDevice, client: &ComputeClient<OfflineRuntime>, what: &str) {
    block_on(client.sync()).unwrap();
    for report in device.take_reports() {
        let name = &report.kernel.name;
        // Sums of two tensors share a buffer, and nobody writes what lies between them.
        let whole = report.gaps.is_empty() || name.contains("column_sum_kernel");
        assert!(report.executed && report.faults.is_empty() && whole, "{what}: {name}: {:?}", report.faults);
    }
}

/// `Σ_k left[i, k] · right[k, j]`.
fn product(left: &[f64], right: &[f64], [rows, columns, depth]: [usize; 3]) -> Vec<f64> {
    let at = |i: usize, j: usize| (0..depth).map(|k| left[i * depth + k] * right[k * columns + j]).sum();
    (0..rows * columns).map(|place| at(place / columns, place % columns)).collect()
}

fn turned(numbers: &[f64], [rows, columns]: [usize; 2]) -> Vec<f64> {
    (0..rows * columns).map(|place| numbers[place % rows * columns + place / rows]).collect()
}

/// Rows, columns, depth.
const SHAPES: [[usize; 3]; 7] =
    [[64, 64, 64], [1, 8, 16], [200, 72, 88], [33, 30, 70], [17, 1, 129], [130, 14, 1100], [9, 13, 40]];

/// Rows of odd sizes are no pairs, which matrix units take: another kernel multiplies them, in f32.
fn pairs(rows: [usize; 2]) -> bool {
    rows.iter().all(|row| row.is_multiple_of(2))
}

#[test]
fn products_agree_with_sums_in_f64() {
    for dtype in [ElementType::BF16, ElementType::F16] {
        for (at, sizes) in SHAPES.into_iter().enumerate() {
            let [rows, columns, depth] = sizes;
            let of_left = if at % 2 == 0 { dtype } else { ElementType::F32 };
            let device = OfflineDevice::of(Gpu::H100);
            let client = OfflineRuntime::client(&device);
            let what = format!("{sizes:?}, {of_left} times {dtype}");
            let (left, right) =
                (factor(&client, [rows, depth], 1, of_left), factor(&client, [depth, columns], 2, dtype));
            let launch = || project(&client, &left.tensor, &right.tensor, ElementType::F32.storage(), MATRIX).unwrap();
            let found = read(&client, &launch());
            assert_clean(&device, &client, &what);
            // The units round the left factor to their type.
            let multiplied = if pairs([depth, columns]) { dtype } else { of_left };
            let multiplied = factor(&client, [rows, depth], 1, multiplied).host;
            let off = error(&found, &product(&multiplied, &right.host, sizes));
            assert!(off < 1e-6, "{what}: {off}");
            assert_eq!(found, read(&client, &launch()), "{what}: other bits");
        }
    }
}

#[test]
fn gradients_of_a_map_agree_with_sums_in_f64() {
    for [tokens, width, hidden] in SHAPES {
        let device = OfflineDevice::of(Gpu::H100);
        let client = OfflineRuntime::client(&device);
        let what = format!("{tokens} tokens, {hidden} to {width}");
        let input = factor(&client, [tokens, hidden], 3, ElementType::BF16);
        let weight = factor(&client, [width, hidden], 4, ElementType::BF16);
        let grad = factor(&client, [tokens, width], 5, ElementType::F32);
        let rounded = factor(&client, [tokens, width], 5, ElementType::BF16).host;
        let multiplied = if pairs([width, hidden]) { &rounded } else { &grad.host };
        let maps = [Map { weight: &weight.tensor, biased: true, grad: &grad.tensor }];
        let launch = || query_backward(&client, &input.tensor, &maps, None, MATRIX).unwrap();
        let found = launch();
        assert_clean(&device, &client, &what);
        let of_weight = read(&client, &found.maps[0].weight);
        let expected = product(&turned(multiplied, [tokens, width]), &input.host, [width, hidden, tokens]);
        assert!(error(&of_weight, &expected) < 1e-6, "{what}: {}", error(&of_weight, &expected));
        let of_input = read(&client, &found.input);
        let expected = product(multiplied, &weight.host, [tokens, hidden, width]);
        assert!(error(&of_input, &expected) < 3e-3, "{what}: {}", error(&of_input, &expected));
        let again = launch();
        assert_eq!(of_weight, read(&client, &again.maps[0].weight), "{what}: other bits");
        assert_eq!(of_input, read(&client, &again.input), "{what}: other bits");
    }
}

/// Of the products of `ultramem_v1_1b`: three quarters of the multiprocessors have work.
#[test]
fn products_reach_the_whole_device() {
    let client = OfflineRuntime::client(&OfflineDevice::of(Gpu::H100));
    let device = Device::of(&client);
    for tokens in [64, 300, 4096] {
        for [rows, columns, depth] in [
            [tokens, 384, 768],
            [tokens, 768, 1536],
            [tokens, 1536, 768],
            [tokens, 768, 384],
            [768, 1536, tokens],
            [384, 768, tokens],
        ] {
            let turned = depth == tokens;
            let plans = MatrixPlans::of(&device, &MatrixSizes { rows, columns, depth, turned, whole: false });
            let cubes = plans.product.launch.cubes;
            // 16 columns are the least that a plane takes.
            assert!(
                4 * cubes >= 3 * 132 || (tokens, columns, cubes) == (64, 384, 96),
                "[{rows}, {depth}] x [{depth}, {columns}]: {cubes} cubes"
            );
        }
    }
}
