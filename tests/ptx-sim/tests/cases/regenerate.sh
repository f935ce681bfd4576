#!/bin/bash
# Generates the .ptx files in this folder from kernels.cu and matmul.mlir, with LLVM 22.
set -eu
cd "$(dirname "$0")"
llvm=${LLVM:-/usr/lib/llvm-22}/bin
for section in $(sed -n 's/^#ifdef \(.*\)/\1/p' kernels.cu); do
    sm=${section##*_}
    features=+ptx$([ "$sm" = 70 ] && echo 64 || echo 70)
    "$llvm/clang" -x cuda -nocudainc -nocudalib --cuda-device-only -S -O3 -D"$section" \
        --cuda-gpu-arch=sm_"$sm" --cuda-feature="$features" kernels.cu -o "$section.ptx"
done
"$llvm/mlir-opt" matmul.mlir -pass-pipeline='builtin.module(
    nvvm-attach-target{chip=sm_70 O=3 features=+ptx64}, convert-scf-to-cf,
    gpu.module(convert-gpu-to-nvvm{use-bare-ptr-memref-call-conv=true}),
    expand-strided-metadata, convert-arith-to-llvm, convert-index-to-llvm, convert-cf-to-llvm,
    reconcile-unrealized-casts, gpu-module-to-binary{format=isa})' |
    sed -n 's/.*assembly = "\(.*\)">\]$/\1/p' | sed 's/\\0A/\n/g; s/\\09/\t/g' >matmul_70.ptx
