//! The quick start of the README: a memory layer in Burn, one training step.

use burn::{backend::Autodiff, tensor::Tensor};
use ultramem::burn::{Trainer, TrainerConfig, UltraMem, UltraMemConfig};

/// The processor. On a GPU: `type Backend = burn::backend::Wgpu`.
type Backend = burn::backend::Flex;

/// One training step.
pub fn main() -> ultramem::Result<()> {
    let device = Default::default();
    let layer: UltraMem<Autodiff<Backend>> = UltraMemConfig::new(64, 128, 32, 64, 16).init(&device)?;
    let mut trainer = Trainer::new(TrainerConfig::new(1000));
    let hidden = Tensor::<Autodiff<Backend>, 3>::ones([2, 8, 64], &device); // [batch, length, hidden_size]
    let loss = (layer.forward(hidden.clone()) - hidden).square().mean();
    let (_layer, report) = trainer.step(1e-3, layer, loss.backward())?;
    println!("loss {}, gradient norm {}", loss.into_scalar(), report.gradient_norm);
    Ok(())
}
