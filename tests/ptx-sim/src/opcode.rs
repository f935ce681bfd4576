//! An opcode and its modifiers. A decoder must take every modifier; one that is left over is not modelled.

use crate::number::Rounding;
use crate::types::Type;

pub struct Opcode<'a> {
    pub name: &'a str,
    modifiers: Vec<&'a str>,
    /// The first `sm_` version that has the instruction.
    pub needs: u32,
}

/// Why an instruction is refused.
pub enum Refusal {
    /// The instruction is known but malformed.
    Wrong(String),
    /// The instruction is not modelled.
    Unknown(String),
}

pub type Decoded<T> = std::result::Result<T, Refusal>;

pub fn wrong<T>(message: impl Into<String>) -> Decoded<T> {
    Err(Refusal::Wrong(message.into()))
}

pub fn unknown<T>(message: impl Into<String>) -> Decoded<T> {
    Err(Refusal::Unknown(message.into()))
}

impl<'a> Opcode<'a> {
    pub fn new(text: &'a str) -> Self {
        let mut words = text.split('.');
        Opcode { name: words.next().unwrap_or(""), modifiers: words.collect(), needs: 0 }
    }

    pub fn take(&mut self, word: &str) -> bool {
        match self.modifiers.iter().position(|&m| m == word) {
            Some(at) => {
                self.modifiers.remove(at);
                true
            }
            None => false,
        }
    }

    /// The value that belongs to the first modifier, from the left, that is one of these words.
    pub fn one_of<T: Copy>(&mut self, words: &[(&str, T)]) -> Option<T> {
        let value = |m: &str| words.iter().find(|(word, _)| *word == m).map(|&(_, value)| value);
        let at = self.modifiers.iter().position(|m| value(m).is_some())?;
        value(self.modifiers.remove(at))
    }

    /// As [`Opcode::one_of`], but refuses the instruction if there is none.
    pub fn needed_one_of<T: Copy>(&mut self, words: &[(&str, T)]) -> Decoded<T> {
        match self.one_of(words) {
            Some(value) => Ok(value),
            None => {
                let words: Vec<String> = words.iter().map(|(word, _)| format!("`.{word}`")).collect();
                unknown(format!("`{}` without one of {}", self.name, words.join(", ")))
            }
        }
    }

    /// The first modifier, from the left, that is one of these words.
    pub fn needed_word(&mut self, words: &[&'static str]) -> Decoded<&'static str> {
        self.needed_one_of(&words.iter().map(|&word| (word, word)).collect::<Vec<_>>())
    }

    /// The next type among the modifiers, from the left.
    pub fn ty(&mut self) -> Decoded<Type> {
        match self.modifiers.iter().position(|m| Type::parse(m).is_some()) {
            Some(at) => Ok(Type::parse(self.modifiers.remove(at)).expect("it parsed")),
            None => unknown(format!("`{}` of a type that is not modelled", self.name)),
        }
    }

    pub fn rounding(&mut self) -> Option<Rounding> {
        self.one_of(&[("rn", Rounding::Nearest), ("rz", Rounding::Zero), ("rm", Rounding::Down), ("rp", Rounding::Up)])
    }

    /// Drops modifiers without effect here: cache hints, and the scopes and orders of the memory model, since the race
    /// check demands no less than the weakest of these.
    pub fn drop_memory_hints(&mut self) {
        const HINTS: [&str; 20] = [
            "weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc", "cta", "gpu", "sys", "cluster", "ca",
            "cg", "cs", "cv", "lu", "wb", "wt", "unified", "mmio",
        ];
        self.modifiers.retain(|m| !HINTS.contains(m) && !m.starts_with("L1::") && !m.starts_with("L2::"));
    }

    pub fn needs(&mut self, sm: u32) {
        self.needs = self.needs.max(sm);
    }

    pub fn done(&self) -> Decoded<()> {
        match self.modifiers.first() {
            Some(word) => unknown(format!("`.{word}` of `{}`", self.name)),
            None => Ok(()),
        }
    }
}
