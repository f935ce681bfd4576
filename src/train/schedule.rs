//! Learning rate schedules.

use std::f64::consts::PI;

use peft_grammar::model::{Recipe, Schedule};

/// The learning rate of step `step` (from 0) of `total`: a linear warm-up from 0 to `lr`, then the schedule.
pub fn rate(recipe: &Recipe, step: u64, total: u64) -> f64 {
    let warmup = recipe.warmup.steps(total);
    let (lr, end) = (recipe.lr, recipe.lr_end);
    if step < warmup {
        return lr * step as f64 / warmup as f64;
    }
    let left = total.saturating_sub(step);
    let decay = total - warmup.min(total - 1);
    let cosine = |rest: f64| end + (lr - end) * 0.5 * (1.0 + (PI * (1.0 - rest)).cos());
    match recipe.schedule {
        Schedule::Constant => lr,
        Schedule::Linear => end + (lr - end) * left as f64 / decay as f64,
        Schedule::Cosine => cosine(left as f64 / decay as f64),
        Schedule::Polynomial { power } => end + (lr - end) * (left as f64 / decay as f64).powf(power),
        Schedule::Wsd { .. } => match total - decay_start(recipe, total) {
            decay if left >= decay => lr,
            decay => cosine(left as f64 / decay as f64),
        },
    }
}

/// The step at which the decay of the learning rate begins.
pub fn decay_start(recipe: &Recipe, total: u64) -> u64 {
    let warmup = recipe.warmup.steps(total).min(total);
    match recipe.schedule {
        Schedule::Wsd { decay } => total.saturating_sub(decay.steps(total)).max(warmup),
        Schedule::Constant => total,
        Schedule::Linear | Schedule::Cosine | Schedule::Polynomial { .. } => warmup,
    }
}

#[cfg(test)]
mod tests;
