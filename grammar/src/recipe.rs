//! The training recipe: the settings of a checked `train` block.

use serde::{Deserialize, Serialize};

use crate::names::Vector;

/// The default of `eps`.
pub const EPS: f64 = 1e-8;
/// The default of `power`, for `schedule: polynomial`.
pub const POWER: f64 = 1.0;
/// The default of `lr_decay`, for `schedule: wsd`.
pub const LR_DECAY: Phase = Phase::Share(0.1);

/// The settings of a training run. Fields that older versions of peftc lack are serialised only when they differ from
/// their defaults, so that existing states and artifacts keep their meaning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The optimizer.
    #[serde(default, skip_serializing_if = "is_default")]
    pub optimizer: Optimizer,
    /// The peak learning rate.
    pub lr: f64,
    /// The decay rates β₁ and β₂ of the moments.
    pub betas: (f64, f64),
    /// The ε of Adam's denominator.
    pub eps: f64,
    /// The weight decay.
    pub weight_decay: f64,
    /// The tensors that weight decay applies to.
    #[serde(default, skip_serializing_if = "is_default")]
    pub decays: DecayScope,
    /// The maximum norm of the gradient over all trainable values; 0 disables clipping.
    pub clip: f64,
    /// The mass that label smoothing moves from the label to all classes.
    pub label_smoothing: f64,
    /// The learning-rate schedule after the warm-up.
    pub schedule: Schedule,
    /// The learning rate at the end of the schedule.
    #[serde(default, skip_serializing_if = "is_default")]
    pub lr_end: f64,
    /// The steps in which the learning rate rises linearly from 0 to `lr`.
    pub warmup: Phase,
    /// The size of a batch.
    pub batch: BatchSize,
    /// The number of batches whose gradients are accumulated into one step.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub accumulate: u64,
    /// The number of passes over the data.
    pub epochs: f64,
    /// The number of steps, which overrides `epochs`.
    pub steps: Option<u64>,
    /// The seed of the random numbers.
    pub seed: u64,
    /// The precision of matrix products with frozen weights.
    #[serde(default)]
    pub precision: Precision,
    /// When the state of the run and its adapter are saved.
    #[serde(default, skip_serializing_if = "is_default")]
    pub save: Every,
    /// When the model is evaluated on held-out data.
    #[serde(default, skip_serializing_if = "is_default")]
    pub evaluate: Every,
    /// The decay of the exponential moving average of the trained values; `None` for no average.
    #[serde(default, skip_serializing_if = "is_default")]
    pub average: Option<f64>,
    /// The run ends after this many evaluations in a row without a new best one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub patience: Option<u64>,
    /// The number of rows that are held out of the training data, if there is no separate evaluation data.
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

/// The size of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BatchSize {
    /// This many sequences.
    Sequences(u64),
    /// As many sequences as fit into a number of tokens, but at least one.
    Tokens {
        /// The maximum number of tokens.
        tokens: u64,
    },
}

impl BatchSize {
    fn to_source(self) -> String {
        match self {
            BatchSize::Sequences(sequences) => sequences.to_string(),
            BatchSize::Tokens { tokens } => format!("{tokens} tokens"),
        }
    }
}

/// The optimizer. `passes/src/interpret/optimizer.rs` holds the equations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Optimizer {
    /// AdamW: decoupled weight decay (Loshchilov & Hutter, 2019).
    #[default]
    AdamW,
    /// Adam (Kingma & Ba, 2015): weight decay is an L2 term of the gradient.
    Adam,
    /// Stochastic gradient descent with heavy-ball momentum: weight decay is an L2 term of the gradient.
    Sgd {
        /// The momentum; 0 for none.
        momentum: f64,
    },
    /// Lion: decoupled weight decay (Chen et al., 2023).
    Lion,
}

/// The trained tensors that weight decay applies to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DecayScope {
    /// Tensors with two or more axes whose name does not end with `.bias`.
    #[default]
    Matrices,
    /// All trained tensors.
    All,
}

impl DecayScope {
    /// The scopes as a spec writes them.
    pub const KEYWORDS: [&str; 2] = ["matrices", "all"];

    /// The scope as a spec writes it.
    pub fn keyword(self) -> &'static str {
        match self {
            DecayScope::Matrices => "matrices",
            DecayScope::All => "all",
        }
    }

    /// Whether weight decay applies to the tensor `name` with this number of axes.
    pub fn applies(self, name: &str, axes: usize) -> bool {
        self == DecayScope::All || axes >= 2 && !name.ends_with(".bias")
    }
}

/// A hyperparameter that the optimizer's kernel receives at each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hyper {
    /// The learning rate of the step.
    Lr,
    /// β₁
    Beta1,
    /// β₂
    Beta2,
    /// ε
    Eps,
    /// The weight decay.
    WeightDecay,
    /// The maximum norm of the gradient.
    Clip,
    /// 1 − β₁
    OneMinusBeta1,
    /// 1 − β₂
    OneMinusBeta2,
    /// 1 − β₁ᵗ
    BiasCorrection1,
    /// 1 − β₂ᵗ
    BiasCorrection2,
    /// The momentum of SGD.
    Momentum,
}

impl Optimizer {
    /// All optimizers; SGD without momentum.
    pub const ALL: [Optimizer; 4] =
        [Optimizer::AdamW, Optimizer::Adam, Optimizer::Sgd { momentum: 0.0 }, Optimizer::Lion];

    /// The optimizer as a spec writes it.
    pub fn keyword(self) -> &'static str {
        match self {
            Optimizer::AdamW => "adamw",
            Optimizer::Adam => "adam",
            Optimizer::Sgd { .. } => "sgd",
            Optimizer::Lion => "lion",
        }
    }

    /// The default β₁ and β₂, which the optimizer's paper recommends. SGD does not read them.
    pub fn betas(self) -> (f64, f64) {
        match self {
            Optimizer::Lion => (0.9, 0.99),
            Optimizer::AdamW | Optimizer::Adam | Optimizer::Sgd { .. } => (0.9, 0.999),
        }
    }

    /// The same optimizer with this momentum, if it is SGD.
    pub fn with_momentum(self, momentum: f64) -> Self {
        if let Optimizer::Sgd { .. } = self { Optimizer::Sgd { momentum } } else { self }
    }

    /// The settings that the optimizer does not read.
    pub fn unread_settings(self) -> &'static [&'static str] {
        match self {
            Optimizer::AdamW | Optimizer::Adam => &["momentum"],
            Optimizer::Sgd { .. } => &["betas", "eps"],
            Optimizer::Lion => &["momentum", "eps"],
        }
    }

    /// The state vectors of the optimizer.
    pub fn moments(self) -> &'static [Vector] {
        match self {
            Optimizer::AdamW | Optimizer::Adam => &[Vector::M, Vector::V],
            Optimizer::Sgd { momentum: 0.0 } => &[],
            Optimizer::Sgd { .. } | Optimizer::Lion => &[Vector::M],
        }
    }

    /// A description of the optimizer's state for messages.
    pub fn state_description(self) -> &'static str {
        match self {
            Optimizer::AdamW | Optimizer::Adam => "Adam's moments",
            Optimizer::Lion => "Lion's momentum",
            Optimizer::Sgd { momentum: 0.0 } => "SGD without momentum",
            Optimizer::Sgd { .. } => "SGD's momentum",
        }
    }

    /// The hyperparameters that the kernel receives, in order. [`Recipe::hyper`] and the kernel both take the order
    /// from here.
    pub fn hyper(self) -> &'static [Hyper] {
        use Hyper::*;
        match self {
            Optimizer::AdamW | Optimizer::Adam => &[
                Lr,
                Beta1,
                Beta2,
                Eps,
                WeightDecay,
                Clip,
                OneMinusBeta1,
                OneMinusBeta2,
                BiasCorrection1,
                BiasCorrection2,
            ],
            Optimizer::Sgd { momentum: 0.0 } => &[Lr, WeightDecay, Clip],
            Optimizer::Sgd { .. } => &[Lr, WeightDecay, Clip, Momentum],
            Optimizer::Lion => &[Lr, Beta1, Beta2, WeightDecay, Clip, OneMinusBeta1, OneMinusBeta2],
        }
    }
}

/// The precision of matrix products with frozen weights. All other computation, the trained values and their gradients
/// included, is f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    /// Operands and sums are f32.
    #[default]
    F32,
    /// Operands are rounded to bf16 and sums are f32. The error of an element of x·w is at most about 2⁻⁷ Σ|x||w|, in
    /// addition to the error of the f32 sum.
    Bf16,
}

impl Precision {
    /// All precisions.
    pub const ALL: [Precision; 2] = [Precision::F32, Precision::Bf16];
    /// The precisions as a spec writes them.
    pub const KEYWORDS: [&str; 2] = [Precision::F32.keyword(), Precision::Bf16.keyword()];

    /// The precision as a spec writes it.
    pub const fn keyword(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// Whether products with frozen weights have a reduced precision, below f32.
    pub fn is_reduced(self) -> bool {
        match self {
            Precision::F32 => false,
            Precision::Bf16 => true,
        }
    }
}

/// The learning-rate schedule after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Schedule {
    /// `lr` throughout.
    Constant,
    /// Linear decay from `lr` to `lr_end`.
    Linear,
    /// Cosine decay from `lr` to `lr_end`, half a period.
    Cosine,
    /// `lr_end + (lr − lr_end) rest^power`, where `rest` decreases linearly from 1 to 0.
    Polynomial {
        /// The exponent.
        power: f64,
    },
    /// Warm-up, stable, decay: `lr` until the last steps, in which the learning rate decreases to `lr_end` along a
    /// cosine.
    Wsd {
        /// The number of steps of the decay.
        decay: Phase,
    },
}

impl Schedule {
    /// The schedules as a spec writes them.
    pub const KEYWORDS: [&str; 5] = ["linear", "constant", "cosine", "polynomial", "wsd"];

    /// The schedule as a spec writes it.
    pub fn keyword(self) -> &'static str {
        match self {
            Schedule::Linear => "linear",
            Schedule::Constant => "constant",
            Schedule::Cosine => "cosine",
            Schedule::Polynomial { .. } => "polynomial",
            Schedule::Wsd { .. } => "wsd",
        }
    }
}

/// The interval of a recurring action, which also happens at the end of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Every {
    /// At the end of each epoch.
    #[default]
    Epoch,
    /// At steps that are multiples of this number.
    Steps(u64),
    /// When this many seconds have passed since the last time.
    Seconds(u64),
}

impl Every {
    /// The first step after `step` at which the action is due; `None` if it depends on time. `epoch` is the first step
    /// after `step` that ends an epoch.
    pub fn next(self, step: u64, epoch: u64) -> Option<u64> {
        match self {
            Every::Epoch => Some(epoch),
            Every::Steps(steps) => Some((step / steps + 1) * steps),
            Every::Seconds(_) => None,
        }
    }

    fn to_source(self) -> String {
        match self {
            Every::Epoch => "epoch".into(),
            Every::Steps(steps) => steps.to_string(),
            Every::Seconds(seconds) => format!("\"{seconds}s\""),
        }
    }
}

/// The seconds of a duration such as `30s`, `10min` or `2h`; `None` if the text is not one, or is zero.
pub(crate) fn seconds(text: &str) -> Option<u64> {
    let units = [("s", 1), ("min", 60), ("h", 3600)];
    let (number, unit) = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))?;
    let digits = number.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| number.parse::<u64>().ok()?.checked_mul(*unit)).flatten().filter(|seconds| *seconds > 0)
}

/// A number of steps, absolute or relative to the run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Phase {
    /// This many steps.
    Steps(u64),
    /// This fraction of all steps.
    Share(f64),
}

impl Phase {
    /// The number of steps in a run of `total` steps. It may exceed `total`.
    pub fn steps(self, total: u64) -> u64 {
        match self {
            Phase::Steps(steps) => steps,
            Phase::Share(share) => (share * total as f64) as u64,
        }
    }

    fn to_source(self) -> String {
        match self {
            Phase::Steps(steps) => steps.to_string(),
            Phase::Share(share) => format!("{share:?}"),
        }
    }
}

impl Recipe {
    /// The settings that a resumed run may change: trained values depend on them only through the number of steps.
    pub const RESUME_MAY_CHANGE: [&str; 5] = ["epochs", "steps", "save", "evaluate", "patience"];

    /// The settings that kernels are specialised for, with their values.
    pub fn kernel_settings(&self) -> Vec<(&'static str, String)> {
        const COMPILED: [&str; 4] = ["optimizer", "decays", "label_smoothing", "precision"];
        let settings = self.settings().into_iter().filter(|(key, _)| COMPILED.contains(key));
        settings.chain([("momentum", self.optimizer.moments().len().to_string())]).collect()
    }

    /// The values of the kernel's hyperparameters at step `step` (from 0) with learning rate `lr`.
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
            Hyper::OneMinusBeta1 => 1.0 - beta1,
            Hyper::OneMinusBeta2 => 1.0 - beta2,
            Hyper::BiasCorrection1 => bias(beta1),
            Hyper::BiasCorrection2 => bias(beta2),
            Hyper::Momentum => match self.optimizer {
                Optimizer::Sgd { momentum } => momentum,
                _ => 0.0,
            },
        };
        self.optimizer.hyper().iter().map(|hyper| number(hyper) as f32).collect()
    }

    /// The weights of the old average and of the values in the average after step `step` (from 0). At step 0 the
    /// average is the values.
    pub fn average_weights(&self, step: u64) -> Option<[f64; 2]> {
        self.average.map(|kept| if step == 0 { [0.0, 1.0] } else { [kept, 1.0 - kept] })
    }

    /// The source text of a `train` block that yields this recipe.
    pub fn to_source(&self) -> String {
        let lines = self.settings().into_iter().map(|(key, value)| format!("  {key}: {value}\n"));
        format!("train {{\n{}}}\n", lines.collect::<String>())
    }

    fn settings(&self) -> Vec<(&'static str, String)> {
        let float = |x: f64| format!("{x:?}");
        let mut all = vec![
            ("optimizer", self.optimizer.keyword().into()),
            ("lr", float(self.lr)),
            ("weight_decay", float(self.weight_decay)),
            ("decays", self.decays.keyword().into()),
            ("clip", float(self.clip)),
            ("label_smoothing", float(self.label_smoothing)),
            ("schedule", self.schedule.keyword().into()),
            ("warmup", self.warmup.to_source()),
            ("batch", self.batch.to_source()),
            ("accumulate", self.accumulate.to_string()),
            ("epochs", float(self.epochs)),
            ("seed", self.seed.to_string()),
            ("precision", self.precision.keyword().into()),
        ];
        // A setting at its default is omitted, because an override may select an optimizer or schedule that does not
        // read it.
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
            Schedule::Wsd { decay } if decay != LR_DECAY => all.push(("lr_decay", decay.to_source())),
            _ => {}
        }
        if self.lr_end != 0.0 {
            all.push(("lr_end", float(self.lr_end)));
        }
        all.extend(self.average.map(|kept| ("average", float(kept))));
        all.push(("save", self.save.to_source()));
        all.push(("evaluate", self.evaluate.to_source()));
        all.extend(self.patience.map(|patience| ("patience", patience.to_string())));
        if self.hold_out > 0 {
            all.push(("hold_out", self.hold_out.to_string()));
        }
        all
    }
}
