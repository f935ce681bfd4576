//! Other people's formats: Hugging Face checkpoints and tokenizers, PEFT's adapters.

pub mod checkpoint;
pub mod peft;
pub mod tokenizer;
