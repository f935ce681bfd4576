//! Other people's formats: Hugging Face checkpoints and tokenizers, GGUF files, PEFT's adapters.

pub mod checkpoint;
#[cfg(feature = "compiler")]
pub mod model_folder;
pub mod peft;
pub mod tokenizer;
