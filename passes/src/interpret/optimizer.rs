//! The reference implementation of the optimizers, in f64: AdamW (Loshchilov & Hutter, 2019), Adam, SGD with momentum,
//! and Lion.

use peft_grammar::model::{Optimizer, Recipe};

/// A trainable number with the state that the optimizer keeps for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainedValue {
    /// The number itself.
    pub value: f64,
    /// The first moment of the gradient, or the momentum.
    pub m: f64,
    /// The second moment of the gradient.
    pub v: f64,
    /// Whether weight decay applies.
    pub decays: bool,
    /// The factor by which its learning rate differs from that of the step.
    pub lr_factor: f64,
}

impl Default for TrainedValue {
    fn default() -> Self {
        TrainedValue { value: 0.0, m: 0.0, v: 0.0, decays: false, lr_factor: 1.0 }
    }
}

/// Takes step number `step` (from 0) at the learning rate `lr`, with the gradient clipped to the recipe's norm. Returns
/// the Euclidean norm of the gradient before clipping.
pub fn step(recipe: &Recipe, lr: f64, step: u64, trained: &mut [TrainedValue], gradients: &[f64]) -> f64 {
    let norm = gradients.iter().map(|g| g * g).sum::<f64>().sqrt();
    let factor = if recipe.clip > 0.0 { (recipe.clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
    for (trained, gradient) in trained.iter_mut().zip(gradients) {
        update(recipe, trained.lr_factor * lr, step, trained, factor * gradient);
    }
    norm
}

/// Gradient accumulation: the gradient of a batch's mean loss from those of its micro-batches. `parts` holds the number
/// of targets and the gradient of each; a gradient is weighted by its micro-batch's share of the targets.
pub fn accumulate(parts: &[(usize, Vec<f64>)]) -> Vec<f64> {
    let targets: usize = parts.iter().map(|(targets, _)| targets).sum();
    let share = |&count: &usize| count as f64 / targets as f64;
    let values = parts.first().map_or(0, |(_, gradient)| gradient.len());
    (0..values).map(|i| parts.iter().map(|(targets, gradient)| share(targets) * gradient[i]).sum()).collect()
}

/// Updates the exponential moving average a of the values p after step `step` (from 0), with the decay d:
///
/// ```text
/// a ← p                  after the first step
/// a ← d a + (1 − d) p    after every later step
/// ```
///
/// This averages the iterates (Polyak & Juditsky, 1992; Tarvainen & Valpola, 2017, equation 1), and begins as PyTorch's
/// `AveragedModel` with `get_ema_multi_avg_fn(d)` does. Without averaging in the recipe it does nothing.
pub fn update_average(recipe: &Recipe, step: u64, averages: &mut [f64], trained: &[TrainedValue]) {
    let Some([of_average, of_value]) = recipe.average_weights(step) else { return };
    for (average, trained) in averages.iter_mut().zip(trained) {
        *average = of_average * *average + of_value * trained.value;
    }
}

/// Updates one value, with g the clipped gradient, p the value, λ the weight decay, η the learning rate, t = step + 1:
///
/// ```text
/// AdamW  m ← β₁ m + (1 − β₁) g    v ← β₂ v + (1 − β₂) g²
///        p ← p (1 − η λ) − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
/// Adam   g ← g + λ p, then as AdamW with λ = 0
/// SGD    g ← g + λ p    m ← μ m + g    p ← p − η m
/// Lion   p ← p (1 − η λ) − η sign(β₁ m + (1 − β₁) g)    m ← β₂ m + (1 − β₂) g
/// ```
fn update(recipe: &Recipe, lr: f64, step: u64, trained: &mut TrainedValue, g: f64) {
    let (beta1, beta2) = recipe.betas;
    let decay = if trained.decays { recipe.weight_decay } else { 0.0 };
    let TrainedValue { value, m, v, .. } = trained;
    let mut adam = |g: f64| {
        *m = beta1 * *m + (1.0 - beta1) * g;
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        let t = (step + 1) as f64;
        (*m / (1.0 - beta1.powf(t))) / ((*v / (1.0 - beta2.powf(t))).sqrt() + recipe.eps)
    };
    match recipe.optimizer {
        Optimizer::AdamW => *value = *value * (1.0 - lr * decay) - lr * adam(g),
        Optimizer::Adam => *value -= lr * adam(g + decay * *value),
        Optimizer::Sgd { momentum } => {
            *m = momentum * *m + g + decay * *value;
            *value -= lr * *m;
        }
        Optimizer::Lion => {
            let sign = |x: f64| if x == 0.0 { 0.0 } else { x.signum() };
            *value = *value * (1.0 - lr * decay) - lr * sign(beta1 * *m + (1.0 - beta1) * g);
            *m = beta2 * *m + (1.0 - beta2) * g;
        }
    }
}
