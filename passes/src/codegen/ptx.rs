//! PTX, the text that a GPU's driver loads, by MLIR and LLVM.

use melior::StringRef;
use melior::ir::BlockLike;
use melior::ir::attribute::{ArrayAttribute, AttributeLike};
use melior::ir::operation::OperationLike;
use melior::utility::register_all_llvm_translations;

use super::{lower_module, run_passes};
use crate::Error;
use crate::dialect::Dialect;
use crate::target::cuda::Chip;

/// The MLIR passes from loops to the `nvvm` and `llvm` dialects. Indices have 32 bits, because a GPU computes with 32
/// bits: an index of 64 bits takes two registers, and its division is a call. The pass `nvvm-attach-target` attaches
/// the chip to the module, from which the PTX writer reads it.
pub fn pipeline(chip: Chip) -> String {
    format!(
        "builtin.module(\
         nvvm-attach-target{{chip={chip} O=3 features={}}},\
         gpu.module(canonicalize,cse,convert-scf-to-cf,convert-gpu-to-nvvm{{index-bitwidth=32}}),\
         convert-cf-to-llvm{{index-bitwidth=32}},\
         reconcile-unrealized-casts,\
         canonicalize,cse)",
        chip.ptx_feature()
    )
}

/// Lowers and writes a module of kernels as PTX.
pub fn write(dialect: &Dialect, module: &str, chip: Chip) -> Result<String, Error> {
    register_all_llvm_translations(dialect.context());
    let module = lower_module(dialect, module, &pipeline(chip))?;
    let module = run_passes(dialect, module, "builtin.module(gpu-module-to-binary{format=isa})")?;
    let none = || dialect.error("LLVM wrote no PTX");
    let binary = module.body().first_operation().ok_or_else(none)?;
    let objects = ArrayAttribute::try_from(binary.attribute("objects").map_err(|_| none())?).map_err(|_| none())?;
    let object = objects.element(0).map_err(|_| none())?;
    // SAFETY: `objects` of a `gpu.binary` are object attributes, and their text lives as long as the context.
    let text = unsafe { StringRef::from_raw(mlir_sys::mlirGPUObjectAttrGetObject(object.to_raw())) };
    text.as_str().map(|text| text.trim_end_matches('\0').to_string()).map_err(|_| none())
}
