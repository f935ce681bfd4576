// The operand of a normalization with dropout stays in memory to the end, so the result is recomputed far from its first
// read, through the view that is read there. A product is kept, and so is a value that is read again soon.
!x = tensor<?x4xf32, "tokens,4">
!pairs = tensor<?x2x2xf32, "tokens,2,2">
!w = tensor<4x4xf32>
!g = tensor<4xf32>

func.func @remat(
    %x: !x {peft.name = "x", peft.role = "input"}, %w: !w {peft.name = "w", peft.role = "frozen"},
    %g: !g {peft.name = "g", peft.role = "frozen"}, %rng: tensor<2xi32> {peft.name = "rng", peft.role = "input"}
) -> (!pairs {peft.name = "z"}) {
  %a = "peft.matmul"(%x, %w) {transpose_x = false, transpose_y = false} : (!x, !w) -> !x
  %n = "peft.normalize"(%a) {eps = 0.0625} : (!x) -> !x
  %h = "peft.mul"(%n, %g) : (!x, !g) -> !x
  %b = "peft.dropout"(%h, %rng) {column = 0, p = 0.25, stream = 3, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>} : (!x, tensor<2xi32>) -> !x
  %c = "peft.matmul"(%b, %w) {transpose_x = false, transpose_y = false} : (!x, !w) -> !x
  %d = "peft.softmax"(%c) : (!x) -> !x
  %e = "peft.matmul"(%d, %w) {transpose_x = false, transpose_y = true} : (!x, !w) -> !x
  %f = "peft.softmax"(%e) : (!x) -> !x
  %f2 = "peft.reshape"(%f) {shape = "[tokens,2,2]"} : (!x) -> !pairs
  %b2 = "peft.reshape"(%b) {shape = "[tokens,2,2]"} : (!x) -> !pairs
  %fb = "peft.mul"(%f2, %b2) : (!pairs, !pairs) -> !pairs
  %a2 = "peft.reshape"(%a) {shape = "[tokens,2,2]"} : (!x) -> !pairs
  %z = "peft.add"(%fb, %a2) : (!pairs, !pairs) -> !pairs
  return %z : !pairs
}
