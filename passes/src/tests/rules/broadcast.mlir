// A column that is multiplied by a matrix needs no explicit broadcast. A broadcast that divides by the copies stays.
!r = tensor<?x1xf32, "tokens,1">
!x = tensor<?x5xf32, "tokens,5">

func.func @repeated(
    %r: !r {peft.name = "r", peft.role = "input"}, %x: !x {peft.name = "x", peft.role = "input"}
) -> (!x {peft.name = "y"}, !x {peft.name = "z"}) {
  %w = "peft.broadcast"(%r) {mean = false, shape = "[tokens,5]"} : (!r) -> !x
  %y = "peft.mul"(%w, %x) : (!x, !x) -> !x
  %m = "peft.broadcast"(%r) {mean = true, shape = "[tokens,5]"} : (!r) -> !x
  %z = "peft.add"(%m, %x) : (!x, !x) -> !x
  return %y, %z : !x, !x
}
