// Dropout of a sum is made again where it is read far away; a product is kept.
!x = tensor<?x4xf32, "tokens,4">
!w = tensor<4x4xf32>

func.func @remat(
    %x: !x {peft.name = "x", peft.role = "input"}, %w: !w {peft.name = "w", peft.role = "frozen"},
    %rng: tensor<2xi32> {peft.name = "rng", peft.role = "input"}
) -> (!x {peft.name = "z"}) {
  %a = "peft.matmul"(%x, %w) {transpose_x = false, transpose_y = false} : (!x, !w) -> !x
  %b = "peft.dropout"(%a, %rng) {column = 0, p = 0.25, stream = 3} : (!x, tensor<2xi32>) -> !x
  %c = "peft.matmul"(%b, %w) {transpose_x = false, transpose_y = false} : (!x, !w) -> !x
  %d = "peft.softmax"(%c) : (!x) -> !x
  %e = "peft.matmul"(%d, %w) {transpose_x = false, transpose_y = true} : (!x, !w) -> !x
  %f = "peft.mul"(%e, %b) : (!x, !x) -> !x
  %z = "peft.add"(%f, %a) : (!x, !x) -> !x
  return %z : !x
}
