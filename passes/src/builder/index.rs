//! Index expressions as formulas. Their operations are emitted when [`Kernel::eval`] evaluates the formula.

use std::ops::{Add, Div, Mul, Rem, Sub};

use super::{INDEX, Kernel, Val};

/// An index or a count that is not yet computed.
#[derive(Clone, Debug)]
pub struct Index(Formula);

#[derive(Clone, Debug)]
enum Formula {
    Val(Val),
    Constant(u64),
    Of(fn(&mut Kernel, Val, Val) -> Val, Box<[Index; 2]>),
}

impl From<Val> for Index {
    fn from(x: Val) -> Index {
        debug_assert_eq!(x.ty, INDEX, "only indices and counts have the index type");
        Index(Formula::Val(x))
    }
}

impl From<u64> for Index {
    fn from(n: u64) -> Index {
        Index(Formula::Constant(n))
    }
}

macro_rules! operators {
    ($($trait:ident $method:ident),+) => {
        $(operators! { $trait $method: Index Index, Index Val, Index u64, Val Index, Val Val, Val u64, u64 Index, u64 Val })+
    };
    ($trait:ident $method:ident: $($left:ident $right:ident),+) => {
        $(impl $trait<$right> for $left {
            type Output = Index;
            fn $method(self, other: $right) -> Index {
                Index(Formula::Of(Kernel::$method, Box::new([self.into(), other.into()])))
            }
        })+
    };
}

operators! { Add add, Sub sub, Mul mul, Div div, Rem rem }

impl Kernel {
    /// Emits a formula: its left operand, its right operand, then the operation itself.
    pub fn eval(&mut self, index: impl Into<Index>) -> Val {
        match index.into().0 {
            Formula::Val(x) => x,
            Formula::Constant(n) => self.index(n),
            Formula::Of(operation, sides) => {
                let [x, y] = sides.map(|side| self.eval(side));
                operation(self, x, y)
            }
        }
    }
}

/// An argument of an operation on values of any type: a value, or an index formula.
pub trait IntoVal {
    fn into_val(self, k: &mut Kernel) -> Val;
}

impl IntoVal for Val {
    fn into_val(self, _: &mut Kernel) -> Val {
        self
    }
}

impl IntoVal for Index {
    fn into_val(self, k: &mut Kernel) -> Val {
        k.eval(self)
    }
}

impl IntoVal for u64 {
    fn into_val(self, k: &mut Kernel) -> Val {
        k.index(self)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{define, first};

    #[test]
    fn a_formula_is_computed_from_left_to_right() {
        let code = define("cpu:x86-64-v3".parse().expect("a machine"), &[], 2, |k, _, sizes| {
            let [x, y] = first(sizes);
            k.eval((x * 8 + y) / (y - 1));
        });
        let text = code.function("kernel", 1);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| line.contains(" = arith")).collect();
        let wanted = [
            "%4 = arith.constant 8 : index",
            "%5 = arith.muli %0, %4 : index",
            "%6 = arith.addi %5, %1 : index",
            "%7 = arith.constant 1 : index",
            "%8 = arith.subi %1, %7 : index",
            "%9 = arith.divui %6, %8 : index",
        ];
        assert_eq!(lines, wanted);
    }
}
