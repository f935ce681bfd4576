//! The language's own library, embedded in the binary: backbones, methods and the functions they share.

/// Modules by path below `models/`, with their texts.
pub const MODULES: &[(&str, &str)] = &[
    ("backbones/bert.peft", include_str!("../../models/backbones/bert.peft")),
    ("backbones/gpt2.peft", include_str!("../../models/backbones/gpt2.peft")),
    ("backbones/roberta.peft", include_str!("../../models/backbones/roberta.peft")),
    ("functions.peft", include_str!("../../models/functions.peft")),
    ("methods/adapter.peft", include_str!("../../models/methods/adapter.peft")),
    ("methods/bitfit.peft", include_str!("../../models/methods/bitfit.peft")),
    ("methods/full.peft", include_str!("../../models/methods/full.peft")),
    ("methods/ia3.peft", include_str!("../../models/methods/ia3.peft")),
    ("methods/inducer.peft", include_str!("../../models/methods/inducer.peft")),
    ("methods/lora.peft", include_str!("../../models/methods/lora.peft")),
    ("methods/prefix.peft", include_str!("../../models/methods/prefix.peft")),
    ("methods/vera.peft", include_str!("../../models/methods/vera.peft")),
];

/// `backbones/gpt2.peft` as an import writes it: `backbones.gpt2`.
pub(crate) fn module_name(path: &str) -> String {
    path.trim_end_matches(".peft").replace('/', ".")
}
