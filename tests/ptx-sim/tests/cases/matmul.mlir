// c = a·b of 32×32 matrices, f16 to f32: a block of one warp makes a 16×16 tile, staged through shared memory.
!a = !gpu.mma_matrix<16x16xf16, "AOp">
!b = !gpu.mma_matrix<16x16xf16, "BOp">
!c = !gpu.mma_matrix<16x16xf32, "COp">
!tile = memref<16x24xf16, #gpu.address_space<workgroup>>
module attributes {gpu.container_module} {
gpu.module @kernels {
  gpu.func @matmul(%a: memref<32x32xf16>, %b: memref<32x32xf16>, %c: memref<32x32xf32>)
      workgroup(%sa: !tile {llvm.align = 32 : i64},
                %sb: !tile {llvm.align = 32 : i64})
      kernel attributes {gpu.known_block_size = array<i32: 32, 1, 1>} {
    %c0 = arith.constant 0 : index
    %c2 = arith.constant 2 : index
    %c8 = arith.constant 8 : index
    %c16 = arith.constant 16 : index
    %c32 = arith.constant 32 : index
    %zero = arith.constant 0.0 : f32
    %t = gpu.thread_id x
    %bx = gpu.block_id x
    %by = gpu.block_id y
    %row = arith.muli %by, %c16 : index
    %column = arith.muli %bx, %c16 : index
    // Each thread copies half a row of either tile.
    %r = arith.divui %t, %c2 : index
    %h = arith.remui %t, %c2 : index
    %s = arith.muli %h, %c8 : index
    %sums = gpu.subgroup_mma_constant_matrix %zero : !c
    %out = scf.for %k = %c0 to %c32 step %c16 iter_args(%x = %sums) -> !c {
      %ar = arith.addi %row, %r : index
      %ac = arith.addi %k, %s : index
      %va = vector.load %a[%ar, %ac] {alignment = 16 : i64} : memref<32x32xf16>, vector<8xf16>
      vector.store %va, %sa[%r, %s] {alignment = 16 : i64} : !tile, vector<8xf16>
      %br = arith.addi %k, %r : index
      %bc = arith.addi %column, %s : index
      %vb = vector.load %b[%br, %bc] {alignment = 16 : i64} : memref<32x32xf16>, vector<8xf16>
      vector.store %vb, %sb[%r, %s] {alignment = 16 : i64} : !tile, vector<8xf16>
      gpu.barrier
      %A = gpu.subgroup_mma_load_matrix %sa[%c0, %c0] {leadDimension = 24 : index} : !tile -> !a
      %B = gpu.subgroup_mma_load_matrix %sb[%c0, %c0] {leadDimension = 24 : index} : !tile -> !b
      %y = gpu.subgroup_mma_compute %A, %B, %x : !a, !b -> !c
      gpu.barrier
      scf.yield %y : !c
    }
    gpu.subgroup_mma_store_matrix %out, %c[%row, %column] {leadDimension = 32 : index} : !c, memref<32x32xf32>
    gpu.return
  }
}
}
