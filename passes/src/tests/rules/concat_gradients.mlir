// Adjoints of the slices of one projection, added in any order: adjacent, with a gap at one end, and sliced again.
!q = tensor<?x2xf32, "tokens,2">
!v = tensor<?x3xf32, "tokens,3">
!qkv = tensor<?x8xf32, "tokens,8">

func.func @concat_gradients(
    %q: !q {peft.name = "q", peft.role = "input"}, %v: !v {peft.name = "v", peft.role = "input"}
) -> (!qkv {peft.name = "whole"}, !qkv {peft.name = "gap"}, !v {peft.name = "part"}) {
  %q0 = "peft.pad"(%q) {axis = 1, start = 0, to = "[8]"} : (!q) -> !qkv
  %v2 = "peft.pad"(%v) {axis = 1, start = 2, to = "[8]"} : (!v) -> !qkv
  %v5 = "peft.pad"(%v) {axis = 1, start = 5, to = "[8]"} : (!v) -> !qkv
  %gap = "peft.add"(%v2, %q0) : (!qkv, !qkv) -> !qkv
  %whole = "peft.add"(%gap, %v5) : (!qkv, !qkv) -> !qkv
  %part = "peft.slice"(%whole) {axis = 1, start = 2, end = 5} : (!qkv) -> !v
  return %whole, %gap, %part : !qkv, !qkv, !v
}
