//! The recipe of a training run: what the `train` block says, checked.

use serde::{Deserialize, Serialize};

use crate::names::Vector;

/// Defaults of settings that not every choice reads.
pub const EPS: f64 = 1e-8;
pub const POWER: f64 = 1.0;
pub const LR_DECAY: Phase = Phase::Share(0.1);

/// A field that an older peftc does not know is written only where it is not at its default, so that states and artifacts
/// of before keep their meaning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    #[serde(default, skip_serializing_if = "is_default")]
    pub optimizer: Optimizer,
    pub lr: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    pub weight_decay: f64,
    /// What it applies to.
    #[serde(default, skip_serializing_if = "is_default")]
    pub decays: Decays,
    /// Global norm over trainable values; 0 = none.
    pub clip: f64,
    pub label_smoothing: f64,
    pub schedule: Schedule,
    /// The rate at which a schedule's decay ends.
    #[serde(default, skip_serializing_if = "is_default")]
    pub lr_end: f64,
    /// Steps in which the rate rises from 0 to `lr`.
    pub warmup: Phase,
    /// What is computed at once.
    pub batch: BatchSize,
    /// So many batches are one step.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub accumulate: u64,
    pub epochs: f64,
    /// Overrides `epochs`.
    pub steps: Option<u64>,
    pub seed: u64,
    #[serde(default)]
    pub precision: Precision,
    /// When the run's state and its adapter are written.
    #[serde(default, skip_serializing_if = "is_default")]
    pub save: Every,
    /// When it is judged by held-out data.
    #[serde(default, skip_serializing_if = "is_default")]
    pub evaluate: Every,
    /// What the average of the trained values keeps of itself at each step; without it there is none.
    #[serde(default, skip_serializing_if = "is_default")]
    pub average: Option<f64>,
    /// The run ends after so many evaluations in a row without a best one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub patience: Option<u64>,
    /// So many rows of the data are held out, where no other data are.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hold_out: u64,
}

fn one() -> u64 {
    1
}

fn is_one(value: &u64) -> bool {
    *value == 1
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// How large a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BatchSize {
    /// So many sequences.
    Sequences(u64),
    /// As many sequences as have at most so many tokens, but one at least.
    Tokens { tokens: u64 },
}

impl BatchSize {
    fn written(self) -> String {
        match self {
            BatchSize::Sequences(sequences) => sequences.to_string(),
            BatchSize::Tokens { tokens } => format!("{tokens} tokens"),
        }
    }
}

/// What makes of gradients a step. The equations stand in `passes/src/interpret/optimizer.rs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Optimizer {
    /// Decoupled weight decay (Loshchilov & Hutter, 2019).
    #[default]
    AdamW,
    /// Weight decay is an L2 term of the gradient (Kingma & Ba, 2015).
    Adam,
    /// Weight decay is an L2 term of the gradient; heavy-ball momentum, 0 for none.
    Sgd { momentum: f64 },
    /// Decoupled weight decay (Chen et al., 2023).
    Lion,
}

/// Which trained tensors weight decay applies to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decays {
    /// Those of two axes or more whose name does not end with `.bias`.
    #[default]
    Matrices,
    All,
}

impl Decays {
    /// As a spec writes them.
    pub const WORDS: [&str; 2] = ["matrices", "all"];

    pub fn word(self) -> &'static str {
        match self {
            Decays::Matrices => "matrices",
            Decays::All => "all",
        }
    }

    /// It applies to a tensor of so many axes.
    pub fn applies(self, name: &str, axes: usize) -> bool {
        self == Decays::All || axes >= 2 && !name.ends_with(".bias")
    }
}

/// A number that the optimizer's kernel is told at each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hyper {
    Lr,
    Beta1,
    Beta2,
    Eps,
    WeightDecay,
    Clip,
    /// 1 − β₁
    Rest1,
    /// 1 − β₂
    Rest2,
    /// 1 − β₁ᵗ
    Bias1,
    /// 1 − β₂ᵗ
    Bias2,
    Momentum,
}

impl Optimizer {
    /// SGD without momentum.
    pub const ALL: [Optimizer; 4] =
        [Optimizer::AdamW, Optimizer::Adam, Optimizer::Sgd { momentum: 0.0 }, Optimizer::Lion];

    /// As a spec writes it.
    pub fn word(self) -> &'static str {
        match self {
            Optimizer::AdamW => "adamw",
            Optimizer::Adam => "adam",
            Optimizer::Sgd { .. } => "sgd",
            Optimizer::Lion => "lion",
        }
    }

    /// The betas that its paper recommends; nothing to SGD.
    pub fn betas(self) -> (f64, f64) {
        match self {
            Optimizer::Lion => (0.9, 0.99),
            Optimizer::AdamW | Optimizer::Adam | Optimizer::Sgd { .. } => (0.9, 0.999),
        }
    }

    /// The same, with this momentum if it has one.
    pub fn with_momentum(self, momentum: f64) -> Self {
        if let Optimizer::Sgd { .. } = self { Optimizer::Sgd { momentum } } else { self }
    }

    /// Settings that it does not read.
    pub fn unread(self) -> &'static [&'static str] {
        match self {
            Optimizer::AdamW | Optimizer::Adam => &["momentum"],
            Optimizer::Sgd { .. } => &["betas", "eps"],
            Optimizer::Lion => &["momentum", "eps"],
        }
    }

    /// What it keeps of each trained value from step to step.
    pub fn moments(self) -> &'static [Vector] {
        match self {
            Optimizer::AdamW | Optimizer::Adam => &[Vector::M, Vector::V],
            Optimizer::Sgd { momentum: 0.0 } => &[],
            Optimizer::Sgd { .. } | Optimizer::Lion => &[Vector::M],
        }
    }

    /// What it keeps, as messages name it.
    pub fn kept(self) -> &'static str {
        match self {
            Optimizer::AdamW | Optimizer::Adam => "Adam's moments",
            Optimizer::Lion => "Lion's momentum",
            Optimizer::Sgd { momentum: 0.0 } => "SGD without momentum",
            Optimizer::Sgd { .. } => "SGD's momentum",
        }
    }

    /// What its kernel is told, in this order, which stands nowhere else: [`Recipe::hyper`] gives the numbers by it, and
    /// the kernel finds them by it.
    pub fn hyper(self) -> &'static [Hyper] {
        use Hyper::*;
        match self {
            Optimizer::AdamW | Optimizer::Adam => {
                &[Lr, Beta1, Beta2, Eps, WeightDecay, Clip, Rest1, Rest2, Bias1, Bias2]
            }
            Optimizer::Sgd { momentum: 0.0 } => &[Lr, WeightDecay, Clip],
            Optimizer::Sgd { .. } => &[Lr, WeightDecay, Clip, Momentum],
            Optimizer::Lion => &[Lr, Beta1, Beta2, WeightDecay, Clip, Rest1, Rest2],
        }
    }
}

/// Of products with frozen weights. Everything else, trained values and their gradients above all, is f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    #[default]
    F32,
    /// Both operands are rounded to bf16, sums are f32: an element of x·w is off by at most little more than
    /// 2⁻⁷ Σ|x||w|, and what sums in f32 are off by.
    Bf16,
}

impl Precision {
    pub const ALL: [Precision; 2] = [Precision::F32, Precision::Bf16];
    /// As a spec writes them.
    pub const WORDS: [&str; 2] = [Precision::F32.word(), Precision::Bf16.word()];

    pub const fn word(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// Products with frozen weights are of fewer bits than f32's.
    pub fn narrows(self) -> bool {
        match self {
            Precision::F32 => false,
            Precision::Bf16 => true,
        }
    }
}

/// How the rate goes on after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Schedule {
    Constant,
    /// A straight line from `lr` to `lr_end`.
    Linear,
    /// Half a period of the cosine, from `lr` to `lr_end`.
    Cosine,
    /// `lr_end + (lr − lr_end) rest^power`, where `rest` falls from 1 to 0 in a straight line.
    Polynomial {
        power: f64,
    },
    /// Warm-up, stable, decay: `lr` until the last steps, in which the rate falls to `lr_end` as a cosine does.
    Wsd {
        decay: Phase,
    },
}

impl Schedule {
    /// As a spec writes them.
    pub const WORDS: [&str; 5] = ["linear", "constant", "cosine", "polynomial", "wsd"];

    pub fn word(self) -> &'static str {
        match self {
            Schedule::Linear => "linear",
            Schedule::Constant => "constant",
            Schedule::Cosine => "cosine",
            Schedule::Polynomial { .. } => "polynomial",
            Schedule::Wsd { .. } => "wsd",
        }
    }
}

/// How often something is done; at the end of a run always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Every {
    #[default]
    Epoch,
    /// At steps that are multiples of this.
    Steps(u64),
    /// When so much time has gone by since the last time.
    Seconds(u64),
}

impl Every {
    /// The first step after `step` at which it is done, by its number alone; `epoch` is the first one after `step` that
    /// ends an epoch.
    pub fn next(self, step: u64, epoch: u64) -> Option<u64> {
        match self {
            Every::Epoch => Some(epoch),
            Every::Steps(steps) => Some((step / steps + 1) * steps),
            Every::Seconds(_) => None,
        }
    }

    fn written(self) -> String {
        match self {
            Every::Epoch => "epoch".into(),
            Every::Steps(steps) => steps.to_string(),
            Every::Seconds(seconds) => format!("\"{seconds}s\""),
        }
    }
}

/// A time such as `30s`, `10min` or `2h`.
pub(crate) fn seconds(text: &str) -> Option<u64> {
    let units = [("s", 1), ("min", 60), ("h", 3600)];
    let (number, unit) = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))?;
    let digits = number.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| number.parse::<u64>().ok()?.checked_mul(*unit)).flatten().filter(|seconds| *seconds > 0)
}

/// A part of a run's steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Phase {
    Steps(u64),
    /// A share of all steps.
    Share(f64),
}

impl Phase {
    /// How many of `total` steps it has, which may be more than there are.
    pub fn steps(self, total: u64) -> u64 {
        match self {
            Phase::Steps(steps) => steps,
            Phase::Share(share) => (share * total as f64) as u64,
        }
    }

    fn written(self) -> String {
        match self {
            Phase::Steps(steps) => steps.to_string(),
            Phase::Share(share) => format!("{share:?}"),
        }
    }
}

impl Recipe {
    /// Settings on which no trained value depends but by the number of steps.
    pub const FREE: [&str; 5] = ["epochs", "steps", "save", "evaluate", "patience"];

    /// Settings that kernels are made for, with their values.
    pub fn compiled(&self) -> Vec<(&'static str, String)> {
        const COMPILED: [&str; 4] = ["optimizer", "decays", "label_smoothing", "precision"];
        let settings = self.settings().into_iter().filter(|(key, _)| COMPILED.contains(key));
        settings.chain([("momentum", self.optimizer.moments().len().to_string())]).collect()
    }

    /// What the optimizer's kernel is told at step `step` (from 0), whose rate is `lr`.
    pub fn hyper(&self, lr: f64, step: u64) -> Vec<f32> {
        let (beta1, beta2) = self.betas;
        let bias = |beta: f64| 1.0 - beta.powf((step + 1) as f64);
        let number = |hyper: &Hyper| match hyper {
            Hyper::Lr => lr,
            Hyper::Beta1 => beta1,
            Hyper::Beta2 => beta2,
            Hyper::Eps => self.eps,
            Hyper::WeightDecay => self.weight_decay,
            Hyper::Clip => self.clip,
            Hyper::Rest1 => 1.0 - beta1,
            Hyper::Rest2 => 1.0 - beta2,
            Hyper::Bias1 => bias(beta1),
            Hyper::Bias2 => bias(beta2),
            Hyper::Momentum => match self.optimizer {
                Optimizer::Sgd { momentum } => momentum,
                _ => 0.0,
            },
        };
        self.optimizer.hyper().iter().map(|hyper| number(hyper) as f32).collect()
    }

    /// What the average keeps of itself, and what it takes of the values, after step `step` (from 0); at first it is those.
    pub fn average_shares(&self, step: u64) -> Option<[f64; 2]> {
        self.average.map(|kept| if step == 0 { [0.0, 1.0] } else { [kept, 1.0 - kept] })
    }

    /// The `train` block that gives this recipe.
    pub fn written(&self) -> String {
        let lines = self.settings().into_iter().map(|(key, value)| format!("  {key}: {value}\n"));
        format!("train {{\n{}}}\n", lines.collect::<String>())
    }

    fn settings(&self) -> Vec<(&'static str, String)> {
        let float = |x: f64| format!("{x:?}");
        let mut all = vec![
            ("optimizer", self.optimizer.word().into()),
            ("lr", float(self.lr)),
            ("weight_decay", float(self.weight_decay)),
            ("decays", self.decays.word().into()),
            ("clip", float(self.clip)),
            ("label_smoothing", float(self.label_smoothing)),
            ("schedule", self.schedule.word().into()),
            ("warmup", self.warmup.written()),
            ("batch", self.batch.written()),
            ("accumulate", self.accumulate.to_string()),
            ("epochs", float(self.epochs)),
            ("seed", self.seed.to_string()),
            ("precision", self.precision.word().into()),
        ];
        // At its default a setting is left out: another choice, which does not read it, may take this one's place.
        if self.betas != self.optimizer.betas() {
            all.push(("betas", format!("[{:?}, {:?}]", self.betas.0, self.betas.1)));
        }
        if self.eps != EPS {
            all.push(("eps", float(self.eps)));
        }
        match self.optimizer {
            Optimizer::Sgd { momentum } if momentum != 0.0 => all.push(("momentum", float(momentum))),
            _ => {}
        }
        all.extend(self.steps.map(|steps| ("steps", steps.to_string())));
        match self.schedule {
            Schedule::Polynomial { power } if power != POWER => all.push(("power", float(power))),
            Schedule::Wsd { decay } if decay != LR_DECAY => all.push(("lr_decay", decay.written())),
            _ => {}
        }
        if self.lr_end != 0.0 {
            all.push(("lr_end", float(self.lr_end)));
        }
        all.extend(self.average.map(|kept| ("average", float(kept))));
        all.push(("save", self.save.written()));
        all.push(("evaluate", self.evaluate.written()));
        all.extend(self.patience.map(|patience| ("patience", patience.to_string())));
        if self.hold_out > 0 {
            all.push(("hold_out", self.hold_out.to_string()));
        }
        all
    }
}
