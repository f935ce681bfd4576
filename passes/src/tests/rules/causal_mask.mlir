// The weights of causal attention, and the adjoint of their scores, are zero at keys after the query.
!heads = tensor<2x?x4xf32, "2,tokens,4">
!square = tensor<2x?x?xf32, "2,tokens,keys">

func.func @causal_mask(
    %q: !heads {peft.name = "q", peft.role = "input"}, %k: !heads {peft.name = "k", peft.role = "input"},
    %v: !heads {peft.name = "v", peft.role = "input"}, %df: !heads {peft.name = "df", peft.role = "input"},
    %rng: tensor<2xi32> {peft.name = "rng", peft.role = "input"}
) -> (!heads {peft.name = "f"}, !heads {peft.name = "dq"}, !heads {peft.name = "dk"}) {
  %raw = "peft.scores"(%q, %k) {causal = true} : (!heads, !heads) -> !square
  %s = "peft.scale"(%raw) {by = 0.5} : (!square) -> !square
  %w = "peft.softmax"(%s) : (!square) -> !square
  %d = "peft.dropout"(%w, %rng) {column = 0, p = 0.25, stream = 3, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>} : (!square, tensor<2xi32>) -> !square
  %f = "peft.attend"(%d, %v) {causal = false} : (!square, !heads) -> !heads
  %dw = "peft.scores"(%df, %v) {causal = false} : (!heads, !heads) -> !square
  %ds = "peft.softmax_vjp"(%w, %dw) : (!square, !square) -> !square
  %dq = "peft.attend"(%ds, %k) {causal = false} : (!square, !heads) -> !heads
  %dk = "peft.attend_transposed"(%ds, %q) {causal = false} : (!square, !heads) -> !heads
  return %f, %dq, %dk : !heads, !heads, !heads
}
