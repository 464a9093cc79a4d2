//! What the tests of the Burn modules share: a tensor's numbers, the gradients by field, weights as a module in half precision holds them.

// Each test is a crate of its own and uses a part of this.
#![allow(dead_code)]

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, backend::AutodiffBackend, backend::Backend};
use ultramem::{HostTensor, PerWeight, Weight, Weights};

/// The numbers of a tensor on the host.
pub fn numbers<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().to_vec().unwrap()
}

/// The gradients of a module's parameters by the names of their fields.
pub fn gradients_by_field<B: AutodiffBackend>(
    module: &impl Module<B>,
    gradients: &B::Gradients,
) -> BTreeMap<String, Vec<f32>> {
    let mut named = Named::<B> { gradients, path: vec![], found: BTreeMap::new() };
    module.visit(&mut named);
    named.found
}

struct Named<'a, B: AutodiffBackend> {
    gradients: &'a B::Gradients,
    path: Vec<String>,
    found: BTreeMap<String, Vec<f32>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Named<'_, B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(gradient) = param.val().grad(self.gradients) {
            self.found.insert(self.path.last().unwrap().clone(), numbers(gradient));
        }
    }
}

/// The name that a weight has in a module: its own, in small letters with underscores.
pub fn field(weight: Weight) -> String {
    let large = format!("{weight:?}");
    let parts = large.char_indices().map(|(at, letter)| match letter.is_uppercase() && at > 0 {
        true => format!("_{}", letter.to_lowercase()),
        false => letter.to_lowercase().to_string(),
    });
    parts.collect()
}

/// The weights, every number of them rounded by `round`.
pub fn rounded(weights: &Weights<'_>, round: impl Fn(&[f32]) -> Vec<f32>) -> Weights<'static> {
    let tensor = |tensor: &HostTensor<'_>| HostTensor::from_f32(tensor.shape(), &round(&tensor.to_f32())).unwrap();
    Weights {
        tensors: PerWeight::from_fn(|weight| weights.get(weight).map(tensor)),
        core_u: round(&weights.core_u),
        core_v: round(&weights.core_v),
        shuffle_index: weights.shuffle_index.clone(),
    }
}
