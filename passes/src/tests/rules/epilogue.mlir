// The launch of a gemm also adds the bias, applies the activation and writes the value that the backward pass reads. A
// reduction over rows is a launch of its own.
!x = tensor<?x4xf32, "tokens,4">
!u = tensor<?x6xf32, "tokens,6">
!w = tensor<4x6xf32>
!b = tensor<6xf32>

func.func @epilogue(
    %x: !x {peft.name = "x", peft.role = "input"}, %w: !w {peft.name = "w", peft.role = "frozen"},
    %b: !b {peft.name = "b", peft.role = "frozen"}
) -> (!u {peft.name = "a"}, tensor<1x6xf32> {peft.name = "s"}) {
  %m = "peft.matmul"(%x, %w) {transpose_x = false, transpose_y = false} : (!x, !w) -> !u
  %u = "peft.add"(%m, %b) : (!u, !b) -> !u
  %a = "peft.gelu_tanh"(%u) : (!u) -> !u
  %s = "peft.reduce"(%u) {axes = array<i64: 0>, keep = true, mean = false} : (!u) -> tensor<1x6xf32>
  return %a, %s : !u, tensor<1x6xf32>
}

// A batched gemm: the epilogue depends on the batch, and the plain product is not written.
!q = tensor<3x?x4xf32, "3,tokens,4">
!t = tensor<3x?x5xf32, "3,tokens,5">

func.func @batches(
    %q: !q {peft.name = "q", peft.role = "input"}, %w: tensor<3x4x5xf32> {peft.name = "w", peft.role = "frozen"},
    %b: tensor<3x1x5xf32> {peft.name = "b", peft.role = "frozen"}, %rng: tensor<2xi32> {peft.name = "rng", peft.role = "input"}
) -> (!t {peft.name = "t"}) {
  %m = "peft.matmul"(%q, %w) {transpose_x = false, transpose_y = false} : (!q, tensor<3x4x5xf32>) -> !t
  %a = "peft.add"(%m, %b) : (!t, tensor<3x1x5xf32>) -> !t
  %t = "peft.tanh"(%a) : (!t) -> !t
  %d = "peft.dropout"(%t, %rng) {p = 0.25 : f64, stream = 3 : i64, column = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>} : (!t, tensor<2xi32>) -> !t
  %s = "peft.mul"(%d, %t) : (!t, !t) -> !t
  return %s : !t
}

// Dropout of gathered rows, which numbers them as in the full tensor, and of a column of such rows.
func.func @numbered(
    %x: !x {peft.name = "x", peft.role = "input"}, %w: !w {peft.name = "w", peft.role = "frozen"},
    %c: tensor<?x1xf32, "tokens,1"> {peft.name = "c", peft.role = "input"}, %u: !u {peft.name = "u", peft.role = "input"},
    %rng: tensor<2xi32> {peft.name = "rng", peft.role = "input"},
    %i: tensor<?xi32, "tokens"> {peft.name = "ids", peft.role = "input"}
) -> (!u {peft.name = "z"}) {
  %m = "peft.matmul"(%x, %w) {transpose_x = false, transpose_y = false} : (!x, !w) -> !u
  %d = "peft.dropout"(%m, %rng, %i) {p = 0.25, stream = 3, column = 0, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0>} : (!u, tensor<2xi32>, tensor<?xi32, "tokens">) -> !u
  %e = "peft.dropout"(%c, %rng, %i) {p = 0.25, stream = 4, column = 0, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0>} : (tensor<?x1xf32, "tokens,1">, tensor<2xi32>, tensor<?xi32, "tokens">) -> tensor<?x1xf32, "tokens,1">
  %s = "peft.mul"(%d, %e) : (!u, tensor<?x1xf32, "tokens,1">) -> !u
  %z = "peft.add"(%s, %u) : (!u, !u) -> !u
  return %z : !u
}
