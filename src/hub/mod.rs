//! File formats of other programs: Hugging Face checkpoints, tokenizers and chat templates, llama.cpp's GGUF files, and
//! the adapters of Hugging Face PEFT.

pub mod chat;
pub mod checkpoint;
#[cfg(feature = "compiler")]
pub mod model_folder;
pub mod peft;
pub mod tokenizer;
