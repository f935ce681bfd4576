// Rows that are not gathered are not computed, even with an operation between the gather and the product.
!x = tensor<?x4xf32, "tokens,4">
!y = tensor<?x3xf32, "tokens,3">
!w = tensor<4x3xf32>
!ids = tensor<?xi32, "targets">
!read = tensor<?x3xf32, "targets,3">
!wide = tensor<?x6xf32, "targets,6">
!d = tensor<?x4xf32, "targets,4">

func.func @gather(
    %x: !x {peft.name = "x", peft.role = "input"}, %w: !w {peft.name = "w", peft.role = "frozen"},
    %v: !w {peft.name = "v", peft.role = "trainable"}, %i: !ids {peft.name = "targets", peft.role = "input"}
) -> (!wide {peft.name = "z"}) {
  %a = "peft.matmul"(%x, %w) {transpose_x = false, transpose_y = false} : (!x, !w) -> !y
  %b = "peft.matmul"(%x, %v) {transpose_x = false, transpose_y = false} : (!x, !w) -> !y
  %c = "peft.concat"(%a, %b) {axis = 1, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>}
    : (!y, !y) -> tensor<?x6xf32, "tokens,6">
  %z = "peft.gather"(%c, %i) {start = 0} : (tensor<?x6xf32, "tokens,6">, !ids) -> !wide
  return %z : !wide
}

func.func @scatter(
    %x: !x {peft.name = "x", peft.role = "input"}, %w: !w {peft.name = "w", peft.role = "frozen"},
    %i: !ids {peft.name = "targets", peft.role = "input"}, %d: !d {peft.name = "d", peft.role = "input"}
) -> (!y {peft.name = "dy"}, tensor<2x4xf32> {peft.name = "dw"}) {
  %all = "peft.scatter"(%i, %d) {rows = "[tokens]", start = 0} : (!ids, !d) -> !x
  %dy = "peft.matmul"(%all, %w) {transpose_x = false, transpose_y = false} : (!x, !w) -> !y
  %part = "peft.slice"(%all) {axis = 1, start = 1, end = 3} : (!x) -> tensor<?x2xf32, "tokens,2">
  %dw = "peft.matmul"(%part, %x) {transpose_x = true, transpose_y = false}
    : (tensor<?x2xf32, "tokens,2">, !x) -> tensor<2x4xf32>
  return %dy, %dw : !y, tensor<2x4xf32>
}

// The gather is pushed up to values that are read in full: `x`, and an output that is computed from all rows of `x`.
func.func @layer(
    %x: !x {peft.name = "x", peft.role = "input"}, %g: tensor<4xf32> {peft.name = "g", peft.role = "frozen"},
    %w: tensor<4x4xf32> {peft.name = "w", peft.role = "trainable"},
    %rng: tensor<2xi32> {peft.name = "rng", peft.role = "input"}, %i: !ids {peft.name = "targets", peft.role = "input"}
) -> (!d {peft.name = "z"}, !x {peft.name = "a"}) {
  %a = "peft.exp"(%x) : (!x) -> !x
  %n = "peft.normalize"(%x) {eps = 1.0e-3} : (!x) -> !x
  %s = "peft.mul"(%n, %g) : (!x, tensor<4xf32>) -> !x
  %m = "peft.matmul"(%s, %w) {transpose_x = false, transpose_y = true} : (!x, tensor<4x4xf32>) -> !x
  %d = "peft.dropout"(%m, %rng) {column = 0, p = 0.25, stream = 3, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>}
    : (!x, tensor<2xi32>) -> !x
  %y = "peft.add"(%a, %d) : (!x, !x) -> !x
  %z = "peft.gather"(%y, %i) {start = 0} : (!x, !ids) -> !d
  return %z, %a : !d, !x
}

// The backward pass: an adjoint stays in gathered rows until it is added to an adjoint of all rows.
func.func @adjoint(
    %x: !x {peft.name = "x", peft.role = "input"}, %other: !x {peft.name = "other", peft.role = "input"},
    %w: tensor<4x4xf32> {peft.name = "w", peft.role = "trainable"},
    %rng: tensor<2xi32> {peft.name = "rng", peft.role = "input"}, %i: !ids {peft.name = "targets", peft.role = "input"},
    %dz: !d {peft.name = "dz", peft.role = "input"}
) -> (!x {peft.name = "dx"}, tensor<4x4xf32> {peft.name = "dw"}, tensor<1x4xf32> {peft.name = "db"}) {
  %n = "peft.normalize"(%x) {eps = 1.0e-3} : (!x) -> !x
  %dy = "peft.scatter"(%i, %dz) {rows = "[tokens]", start = 0} : (!ids, !d) -> !x
  %dm = "peft.dropout"(%dy, %rng) {column = 0, p = 0.25, stream = 3, operandSegmentSizes = array<i32: 1, 1, 0, 0, 0, 0, 0, 0>}
    : (!x, tensor<2xi32>) -> !x
  %db = "peft.reduce"(%dm) {axes = array<i64: 0>, keep = true, mean = false} : (!x) -> tensor<1x4xf32>
  %dw = "peft.matmul"(%dm, %n) {transpose_x = true, transpose_y = false} : (!x, !x) -> tensor<4x4xf32>
  %dn = "peft.matmul"(%dm, %w) {transpose_x = false, transpose_y = false} : (!x, tensor<4x4xf32>) -> !x
  %dh = "peft.normalize_vjp"(%x, %dn) {eps = 1.0e-3} : (!x, !x) -> !x
  %sum = "peft.add"(%dy, %dh) : (!x, !x) -> !x
  %dx = "peft.add"(%sum, %other) : (!x, !x) -> !x
  return %dx, %dw, %db : !x, tensor<4x4xf32>, tensor<1x4xf32>
}
