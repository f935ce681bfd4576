// Attention forward and backward without a score matrix, with dropout and a factor for each row.
!heads = tensor<2x?x4xf32, "2,tokens,4">
!row = tensor<2x?x1xf32, "2,tokens,1">
!square = tensor<2x?x?xf32, "2,tokens,keys">

func.func @attention(
    %q: !heads {peft.name = "q", peft.role = "input"}, %k: !heads {peft.name = "k", peft.role = "input"},
    %v: !heads {peft.name = "v", peft.role = "input"}, %df: !heads {peft.name = "df", peft.role = "input"},
    %r: !row {peft.name = "r", peft.role = "input"}, %rng: tensor<2xi32> {peft.name = "rng", peft.role = "input"}
) -> (!heads {peft.name = "f"}, !row {peft.name = "lse"}, !heads {peft.name = "dq"}, !heads {peft.name = "dk"},
    !heads {peft.name = "dv"}) {
  %raw = "peft.scores"(%q, %k) {causal = true} : (!heads, !heads) -> !square
  %s = "peft.scale"(%raw) {by = 0.5} : (!square) -> !square
  %lse = "peft.log_sum_exp"(%s) : (!square) -> !row
  %w = "peft.softmax"(%s) : (!square) -> !square
  %d = "peft.dropout"(%w, %rng) {column = 0, p = 0.25, stream = 3, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>} : (!square, tensor<2xi32>) -> !square
  %rd = "peft.mul"(%d, %r) : (!square, !row) -> !square
  %f = "peft.attend"(%rd, %v) {causal = false} : (!square, !heads) -> !heads

  %dv = "peft.attend_transposed"(%rd, %df) {causal = false} : (!square, !heads) -> !heads
  %drd = "peft.scores"(%df, %v) {causal = false} : (!heads, !heads) -> !square
  %dd = "peft.mul"(%drd, %r) : (!square, !row) -> !square
  %dw = "peft.dropout"(%dd, %rng) {column = 0, p = 0.25, stream = 3, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>} : (!square, tensor<2xi32>) -> !square
  %ds = "peft.softmax_vjp"(%w, %dw) : (!square, !square) -> !square
  %draw = "peft.scale"(%ds) {by = 0.5} : (!square) -> !square
  %dq = "peft.attend"(%draw, %k) {causal = false} : (!square, !heads) -> !heads
  %dk = "peft.attend_transposed"(%draw, %q) {causal = false} : (!square, !heads) -> !heads
  return %f, %lse, %dq, %dk, %dv : !heads, !row, !heads, !heads, !heads
}
