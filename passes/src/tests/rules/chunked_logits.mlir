// The logits of a frozen part of the output embedding are chunked, those of a trained part are not; the loss and the
// adjoints of both.
!x = tensor<?x4xf32, "targets,4">
!a = tensor<8x4xf32>
!b = tensor<3x4xf32>
!ids = tensor<?xi32, "targets">
!loss = tensor<?xf32, "targets">
!as = tensor<?x8xf32, "targets,8">
!bs = tensor<?x3xf32, "targets,3">
!logits = tensor<?x11xf32, "targets,11">

func.func @chunked_logits(
    %x: !x {peft.name = "x", peft.role = "input"}, %a: !a {peft.name = "a", peft.role = "frozen"},
    %b: !b {peft.name = "b", peft.role = "trainable"}, %t: !ids {peft.name = "t", peft.role = "input"},
    %d: !loss {peft.name = "d", peft.role = "input"}
) -> (!loss {peft.name = "loss"}, !x {peft.name = "dx"}, !bs {peft.name = "ds"}) {
  %as = "peft.matmul"(%x, %a) {transpose_x = false, transpose_y = true} : (!x, !a) -> !as
  %bs = "peft.matmul"(%x, %b) {transpose_x = false, transpose_y = true} : (!x, !b) -> !bs
  %logits = "peft.concat"(%as, %bs) {axis = 1, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>}
    : (!as, !bs) -> !logits
  %loss = "peft.cross_entropy"(%logits, %t) {smoothing = 0.125} : (!logits, !ids) -> !loss
  %dlogits = "peft.cross_entropy_vjp"(%logits, %t, %d) {smoothing = 0.125} : (!logits, !ids, !loss) -> !logits
  %das = "peft.slice"(%dlogits) {axis = 1, start = 0, end = 8} : (!logits) -> !as
  %dbs = "peft.slice"(%dlogits) {axis = 1, start = 8, end = 11} : (!logits) -> !bs
  %dx = "peft.matmul"(%das, %a) {transpose_x = false, transpose_y = false} : (!as, !a) -> !x
  return %loss, %dx, %dbs : !loss, !x, !bs
}
