//! Other people's formats: Hugging Face checkpoints, tokenizers and chat templates, GGUF files, PEFT's adapters.

pub mod chat;
pub mod checkpoint;
#[cfg(feature = "compiler")]
pub mod model_folder;
pub mod peft;
pub mod tokenizer;
