// Extra columns before scores: one softmax for each part and the weight between them. A single column needs no softmax.
!heads = tensor<2x?x4xf32, "2,tokens,4">
!front = tensor<2x?x3xf32, "2,tokens,3">
!column = tensor<2x?x1xf32, "2,tokens,1">
!square = tensor<2x?x?xf32, "2,tokens,keys">
!joint = tensor<2x?x?xf32, "2,tokens,keys+3">
!second = tensor<2x?x?xf32, "2,tokens,keys+1">

func.func @forward(
    %a: !front {peft.name = "a", peft.role = "input"}, %s: !square {peft.name = "s", peft.role = "input"},
    %rng: tensor<2xi32> {peft.name = "rng", peft.role = "input"}
) -> (!front {peft.name = "x"}, !square {peft.name = "y"}) {
  %as = "peft.concat"(%a, %s) {axis = 2, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>}
    : (!front, !square) -> !joint
  %w = "peft.softmax"(%as) : (!joint) -> !joint
  %d = "peft.dropout"(%w, %rng) {column = 0, p = 0.25, stream = 3, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>} : (!joint, tensor<2xi32>) -> !joint
  %x = "peft.slice"(%d) {axis = 2, start = 0, end = 3} : (!joint) -> !front
  %y = "peft.slice"(%d) {axis = 2, start = 3, end = -1} : (!joint) -> !square
  return %x, %y : !front, !square
}

func.func @adjoint(
    %a: !column {peft.name = "a", peft.role = "input"}, %s: !square {peft.name = "s", peft.role = "input"},
    %da: !column {peft.name = "da", peft.role = "input"}, %ds: !square {peft.name = "ds", peft.role = "input"}
) -> (!column {peft.name = "x"}, !square {peft.name = "y"}) {
  %as = "peft.concat"(%a, %s) {axis = 2, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>}
    : (!column, !square) -> !second
  %w = "peft.softmax"(%as) : (!second) -> !second
  %left = "peft.pad"(%da) {axis = 2, start = 0, to = "[keys+1]"} : (!column) -> !second
  %right = "peft.pad"(%ds) {axis = 2, start = 1, to = "[keys+1]"} : (!square) -> !second
  %dw = "peft.add"(%left, %right)
    : (!second, !second) -> !second
  %d = "peft.softmax_vjp"(%w, %dw)
    : (!second, !second) -> !second
  %x = "peft.slice"(%d) {axis = 2, start = 0, end = 1} : (!second) -> !column
  %y = "peft.slice"(%d) {axis = 2, start = 1, end = -1} : (!second) -> !square
  return %x, %y : !column, !square
}
