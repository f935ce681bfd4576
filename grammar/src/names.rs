//! Names that artifacts, files and the parts of peftc share: of entries, of what they read and give, and of the
//! optimizer's vectors.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! named {
    ($(#[$doc:meta])* $type:ident { $($(#[$of:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $type {
            $($(#[$of])* #[serde(rename = $name)] $variant,)*
        }

        impl $type {
            pub const ALL: &'static [$type] = &[$($type::$variant),*];

            pub const fn name(self) -> &'static str {
                match self {
                    $($type::$variant => $name,)*
                }
            }

            pub fn of(name: &str) -> Option<Self> {
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
    /// What is computed of a model's equations; the optimizer's entries, [`OptimizerEntry`], are the same for all models.
    Entry {
        /// Loss, logits and what the model exposes, without dropout and smoothing.
        Forward = "forward",
        /// What is reported of data held out: the loss, and a classifier's logits. Without dropout and smoothing.
        Eval = "eval",
        /// The training form: loss, logits, what is exposed, and every gradient.
        Grad = "grad",
        /// The training form: loss and every gradient.
        Train = "train",
        /// What weights that start from a value of others start from. Without a batch, as the next two.
        Init = "init",
        /// What is kept in place of trained weights.
        Store = "store",
        /// Methods folded into the backbone's matrices; of no artifact, since it wants all weights as they are.
        Merge = "merge",
    }
}

named! {
    /// What is computed of the optimizer's vectors. An artifact has it beside a model's entries if anything trains.
    OptimizerEntry {
        /// The step.
        Update = "update",
        /// Follows every batch of a step but the last one.
        Accumulate = "accumulate",
        /// Follows the last of a step's several batches.
        Accumulated = "accumulated",
        /// Follows the step where the recipe averages.
        Average = "average",
    }
}

named! {
    /// A vector over all trainable values.
    Vector {
        Values = "values",
        Gradients = "gradients",
        /// The first moment, or the momentum.
        M = "m",
        /// The second moment.
        V = "v",
        /// 1 where weight decay applies, else 0.
        Decay = "decay",
        /// What each value's learning rate is of the step's.
        LrFactors = "lr_factors",
        /// Gradients of batches before the last one of a step.
        Sums = "sums",
        /// Averages of the values over the steps.
        Averages = "averages",
    }
}

named! {
    /// What a run is given, or is derived from the sequences' lengths.
    Input {
        // A batch's, which equations may read.
        Ids = "ids",
        Types = "types",
        Positions = "positions",
        /// Where each sequence begins and ends.
        Starts = "starts",
        Ends = "ends",
        /// Tokens that the loss is of.
        Targets = "targets",
        Labels = "labels",
        /// The seed and the step.
        Rng = "rng",
        // Of the packed axis.
        Offsets = "offsets",
        Segments = "segments",
        Pairs = "pairs",
        // The optimizer's numbers.
        Hyper = "hyper",
        Shares = "shares",
        AverageShares = "average_shares",
    }
}

impl Vector {
    /// What steps change, in the order in which states hold it.
    pub const CHANGED: [Vector; 4] = [Vector::Values, Vector::M, Vector::V, Vector::Averages];
}

pub const LOSS: &str = "loss";
pub const LOGITS: &str = "logits";
/// The gradient's norm before clipping.
pub const GRAD_NORM: &str = "grad_norm";
const GRADIENT: &str = "grad.";
const LAMBDA: &str = "lambda.";

/// A result of an entry, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output<'a> {
    Loss,
    Logits,
    GradNorm,
    /// Of a trained tensor, or of rows of it.
    Gradient(&'a str),
    /// Of a layer; a number for each head and token.
    Lambda(&'a str),
    /// Something else that is exposed, or kept.
    Other(&'a str),
}

impl<'a> Output<'a> {
    pub fn of(name: &'a str) -> Self {
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

    /// Whose gradient it is, if it is one.
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
    fn names_read_back() {
        let outputs = ["loss", "logits", "grad_norm", "grad.layers.0.lora.a[0:3]", "lambda.11", "gradient", "scores"];
        let found = outputs.map(Output::of);
        assert_eq!(found.map(|output| output.to_string()), outputs);
        assert_eq!(
            found[3..6],
            [Output::Gradient("layers.0.lora.a[0:3]"), Output::Lambda("11"), Output::Other("gradient")]
        );
        assert!(Entry::ALL.iter().all(|entry| Entry::of(entry.name()) == Some(*entry)));
        assert_eq!((Entry::of("update"), Vector::of("lr_factors")), (None, Some(Vector::LrFactors)));
        assert_eq!(serde_json::to_string(&Vector::LrFactors).unwrap(), "\"lr_factors\"");
    }
}
