//! The language's own library, embedded in the binary: backbones, methods and the functions they share.

/// Modules by path below `models/`, with their texts: every file there is one.
pub const MODULES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// `backbones/gpt2.peft` as an import writes it: `backbones.gpt2`.
pub(crate) fn module_name(path: &str) -> String {
    path.trim_end_matches(".peft").replace('/', ".")
}
