// A bias, an activation and what is kept for the way back are the product's own launch; a sum over rows is none.
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
