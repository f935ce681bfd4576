//! Names that artifacts, files and the crates of peftc share: those of entry points, of their inputs and outputs, and
//! of the optimizer's vectors.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Defines an enum whose variants have names: in text, in JSON and in the code generated for artifacts.
macro_rules! named {
    ($(#[$doc:meta])* $type:ident { $($(#[$of:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $type {
            $($(#[$of])* #[serde(rename = $name)] $variant,)*
        }

        impl $type {
            /// All variants, in order of declaration.
            pub const ALL: &'static [$type] = &[$($type::$variant),*];

            /// The name in artifacts and files.
            pub const fn name(self) -> &'static str {
                match self {
                    $($type::$variant => $name,)*
                }
            }

            /// The variant of this name.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| known.name() == name)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

named! {
    /// An entry point that is compiled from a model's graph. The optimizer's entry points, [`OptimizerEntry`], do not
    /// depend on the model.
    Entry {
        /// Loss, logits and exposed values, without dropout and label smoothing.
        Forward = "forward",
        /// What an evaluation on held-out data reports: the loss and, for a classifier, the logits. Without dropout and
        /// label smoothing.
        Eval = "eval",
        /// The training form: loss, logits, exposed values, and the gradient of every trainable tensor.
        Grad = "grad",
        /// The training form: loss, and the gradient of every trainable tensor.
        Train = "train",
        /// The initial values of weights that are computed from other weights. `init`, `store` and `merge` read no
        /// batch.
        Init = "init",
        /// The values that are saved in place of trained weights, from `store` statements.
        Store = "store",
        /// The backbone's matrices with the methods merged into them. No saved artifact contains this entry point,
        /// since it needs all weights unmodified.
        Merge = "merge",
    }
}

named! {
    /// An entry point on the optimizer's vectors. An artifact contains them, next to a model's entry points, if
    /// anything trains.
    OptimizerEntry {
        /// One optimizer step.
        Update = "update",
        /// Adds the gradients of a batch to the sums. It runs after every batch of a step but the last.
        Accumulate = "accumulate",
        /// Combines the sums with the gradients of the last of a step's several batches.
        Accumulated = "accumulated",
        /// Updates the averages of the values. It runs after a step if the recipe has `average`.
        Average = "average",
    }
}

named! {
    /// A flat f32 vector with one element for each trainable value.
    Vector {
        /// The trainable values.
        Values = "values",
        /// The gradients of the current batch.
        Gradients = "gradients",
        /// The first moment, or the momentum.
        M = "m",
        /// The second moment.
        V = "v",
        /// 1 where weight decay applies, else 0.
        Decay = "decay",
        /// The ratio of each value's learning rate to the step's.
        LrFactors = "lr_factors",
        /// The sum of the gradients of a step's batches, all but the last.
        Sums = "sums",
        /// The exponential moving averages of the values.
        Averages = "averages",
    }
}

named! {
    /// An input of a run, or an input that is derived from the lengths of the sequences.
    Input {
        /// `i32[tokens]`: the token ids.
        Ids = "ids",
        /// `i32[tokens]`: the token types.
        Types = "types",
        /// `i32[tokens]`: the position of each token in its sequence.
        Positions = "positions",
        /// `i32[sequences]`: the index of the first token of each sequence.
        Starts = "starts",
        /// `i32[sequences]`: the index of the last token of each sequence.
        Ends = "ends",
        /// `i32[targets]`: the indices of the tokens whose outputs enter the loss.
        Targets = "targets",
        /// The labels: tokens, classes or numbers, depending on the task.
        Labels = "labels",
        /// `i32[2]`: the seed and the step, the key of the random numbers.
        Rng = "rng",
        /// `i32[sequences + 1]`: the index of the first token of each sequence, and the number of tokens.
        Offsets = "offsets",
        /// `i32[tokens]`: the sequence of each token.
        Segments = "segments",
        /// `i32[tokens + 1]`: the exclusive prefix sum of the sequence length of each token, which is the offset of
        /// each row of a ragged axis.
        Pairs = "pairs",
        /// f32: the optimizer's hyperparameters of a step, as [`Recipe::hyper`](crate::recipe::Recipe::hyper) lists
        /// them.
        Hyper = "hyper",
        /// `f32[2]`: the weights of the two vectors that `accumulate` and `accumulated` add.
        Shares = "shares",
        /// `f32[2]`: the weights of the averages and of the values in the new averages.
        AverageShares = "average_shares",
    }
}

impl Vector {
    /// The vectors that a step updates, in the order of a saved state.
    pub const UPDATED: [Vector; 4] = [Vector::Values, Vector::M, Vector::V, Vector::Averages];
}

/// The output that holds the loss, a scalar.
pub const LOSS: &str = "loss";
/// The output that holds the logits.
pub const LOGITS: &str = "logits";
/// The output that holds the norm of the gradient before clipping.
pub const GRAD_NORM: &str = "grad_norm";
const GRADIENT: &str = "grad.";
const LAMBDA: &str = "lambda.";

/// An output of an entry point, identified by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output<'a> {
    /// The loss.
    Loss,
    /// The logits.
    Logits,
    /// The norm of the gradient before clipping.
    GradNorm,
    /// The gradient of this trained tensor, or of a range of its rows: `grad.layers.0.lora.a[0:3]`.
    Gradient(&'a str),
    /// The inducer's weights λ of this layer, one for each head and token: `lambda.0`.
    Lambda(&'a str),
    /// Another exposed or stored value.
    Other(&'a str),
}

impl<'a> Output<'a> {
    /// The output of this name.
    pub fn from_name(name: &'a str) -> Self {
        match name {
            LOSS => Output::Loss,
            LOGITS => Output::Logits,
            GRAD_NORM => Output::GradNorm,
            _ => match (name.strip_prefix(GRADIENT), name.strip_prefix(LAMBDA)) {
                (Some(tensor), _) => Output::Gradient(tensor),
                (_, Some(layer)) => Output::Lambda(layer),
                _ => Output::Other(name),
            },
        }
    }

    /// The tensor, or range of rows, that the output is the gradient of.
    pub fn gradient(self) -> Option<&'a str> {
        if let Output::Gradient(tensor) = self { Some(tensor) } else { None }
    }
}

impl fmt::Display for Output<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Output::Loss => f.write_str(LOSS),
            Output::Logits => f.write_str(LOGITS),
            Output::GradNorm => f.write_str(GRAD_NORM),
            Output::Gradient(tensor) => write!(f, "{GRADIENT}{tensor}"),
            Output::Lambda(layer) => write!(f, "{LAMBDA}{layer}"),
            Output::Other(name) => f.write_str(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        let outputs = ["loss", "logits", "grad_norm", "grad.layers.0.lora.a[0:3]", "lambda.11", "gradient", "scores"];
        let found = outputs.map(Output::from_name);
        assert_eq!(found.map(|output| output.to_string()), outputs);
        assert_eq!(
            found[3..6],
            [Output::Gradient("layers.0.lora.a[0:3]"), Output::Lambda("11"), Output::Other("gradient")]
        );
        assert!(Entry::ALL.iter().all(|entry| Entry::from_name(entry.name()) == Some(*entry)));
        assert_eq!((Entry::from_name("update"), Vector::from_name("lr_factors")), (None, Some(Vector::LrFactors)));
        assert_eq!(serde_json::to_string(&Vector::LrFactors).unwrap(), "\"lr_factors\"");
    }
}
