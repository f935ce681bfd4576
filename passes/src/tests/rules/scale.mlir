// A factor moves to a product with fewer columns, to the operand with fewer columns on either side, and past a sum. It
// stays where the product has more columns.
!x = tensor<?x6xf32, "tokens,6">
!h = tensor<?x2xf32, "tokens,2">
!up = tensor<2x6xf32, "2,6">
!down = tensor<6x2xf32, "6,2">
!sum = tensor<6xf32, "6">

func.func @scale(
    %x: !x {peft.name = "x", peft.role = "input"}, %h: !h {peft.name = "h", peft.role = "input"},
    %b: !down {peft.name = "b", peft.role = "trainable"}, %a: !up {peft.name = "a", peft.role = "trainable"}
) -> (!h {peft.name = "down"}, !down {peft.name = "left"}, !up {peft.name = "right"}, !sum {peft.name = "sum"},
      !x {peft.name = "wide"}) {
  %s = "peft.scale"(%x) {by = 0.5} : (!x) -> !x
  %t = "peft.scale"(%h) {by = 3.0} : (!h) -> !h
  %down = "peft.matmul"(%s, %b) {transpose_x = false, transpose_y = false} : (!x, !down) -> !h
  %left = "peft.matmul"(%s, %h) {transpose_x = true, transpose_y = false} : (!x, !h) -> !down
  %right = "peft.matmul"(%h, %s) {transpose_x = true, transpose_y = false} : (!h, !x) -> !up
  %sum = "peft.reduce"(%s) {axes = array<i64: 0>, keep = false, mean = false} : (!x) -> !sum
  %wide = "peft.matmul"(%t, %a) {transpose_x = false, transpose_y = false} : (!h, !up) -> !x
  return %down, %left, %right, %sum, %wide : !h, !down, !up, !sum, !x
}
