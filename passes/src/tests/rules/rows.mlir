// Rows that are not read are not computed, whatever stands between the gather and its product.
!x = tensor<?x4xf32, "tokens,4">
!y = tensor<?x3xf32, "tokens,3">
!w = tensor<4x3xf32>
!ids = tensor<?xi32, "targets">
!read = tensor<?x3xf32, "targets,3">
!wide = tensor<?x6xf32, "targets,6">
!d = tensor<?x4xf32, "targets,4">

func.func @gather(
    %x: !x {peft.name = "x", peft.role = "input"}, %w: !w {peft.name = "w", peft.role = "frozen"},
    %v: !w {peft.name = "v", peft.role = "trainable"}, %i: !ids {peft.name = "i", peft.role = "input"}
) -> (!wide {peft.name = "z"}) {
  %a = "peft.matmul"(%x, %w) {transpose_x = false, transpose_y = false} : (!x, !w) -> !y
  %b = "peft.matmul"(%x, %v) {transpose_x = false, transpose_y = false} : (!x, !w) -> !y
  %c = "peft.concat"(%a, %b) {axis = 1, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>}
    : (!y, !y) -> tensor<?x6xf32, "tokens,6">
  %z = "peft.gather"(%c, %i) {start = 0} : (tensor<?x6xf32, "tokens,6">, !ids) -> !wide
  return %z : !wide
}

func.func @scatter(
    %x: !x {peft.name = "x", peft.role = "input"}, %w: !w {peft.name = "w", peft.role = "frozen"},
    %i: !ids {peft.name = "i", peft.role = "input"}, %d: !d {peft.name = "d", peft.role = "input"}
) -> (!y {peft.name = "dy"}, tensor<2x4xf32> {peft.name = "dw"}) {
  %all = "peft.scatter"(%i, %d) {rows = "[tokens]", start = 0} : (!ids, !d) -> !x
  %dy = "peft.matmul"(%all, %w) {transpose_x = false, transpose_y = false} : (!x, !w) -> !y
  %part = "peft.slice"(%all) {axis = 1, start = 1, end = 3} : (!x) -> tensor<?x2xf32, "tokens,2">
  %dw = "peft.matmul"(%part, %x) {transpose_x = true, transpose_y = false}
    : (tensor<?x2xf32, "tokens,2">, !x) -> tensor<2x4xf32>
  return %dy, %dw : !y, tensor<2x4xf32>
}
