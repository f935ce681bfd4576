//! PTX, the text that a GPU's driver gets, by MLIR and LLVM.

use melior::StringRef;
use melior::ir::BlockLike;
use melior::ir::attribute::{ArrayAttribute, AttributeLike};
use melior::ir::operation::OperationLike;
use melior::utility::register_all_llvm_translations;

use super::{lowered, through};
use crate::Error;
use crate::dialect::Dialect;
use crate::target::cuda::Chip;

/// From loops to the `nvvm` and `llvm` dialects, for a GPU, whose numbers have 32 bits, and places among a buffer's elements with them: what has 64 is two
/// registers there, and a division of it is a call. The target goes with the module, and comes with it to what writes PTX.
pub fn pipeline(chip: Chip) -> String {
    format!(
        "builtin.module(\
         nvvm-attach-target{{chip={chip} O=3 features={}}},\
         gpu.module(canonicalize,cse,convert-scf-to-cf,convert-gpu-to-nvvm{{index-bitwidth=32}}),\
         convert-cf-to-llvm{{index-bitwidth=32}},\
         reconcile-unrealized-casts,\
         canonicalize,cse)",
        chip.ptx()
    )
}

/// A module of kernels as PTX.
pub fn write(dialect: &Dialect, module: &str, chip: Chip) -> Result<String, Error> {
    register_all_llvm_translations(dialect.context());
    let module = lowered(dialect, module, &pipeline(chip))?;
    let module = through(dialect, module, "builtin.module(gpu-module-to-binary{format=isa})")?;
    let none = || dialect.error("LLVM wrote no PTX");
    let binary = module.body().first_operation().ok_or_else(none)?;
    let objects = ArrayAttribute::try_from(binary.attribute("objects").map_err(|_| none())?).map_err(|_| none())?;
    let object = objects.element(0).map_err(|_| none())?;
    // SAFETY: what a `gpu.binary` holds are objects, whose text lives as long as the context.
    let text = unsafe { StringRef::from_raw(mlir_sys::mlirGPUObjectAttrGetObject(object.to_raw())) };
    text.as_str().map(|text| text.trim_end_matches('\0').to_string()).map_err(|_| none())
}
