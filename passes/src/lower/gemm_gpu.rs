//! Products on a GPU: how their operands lie. Which kernel computes them is chosen in [`super::schedule`].

use std::ops::Range;

use peft_grammar::graph::Value;
use peft_runtime::artifact::{BufferId, Extent};

use super::dispatch::Taken;
use super::entry::{Place, Turn};
use super::epilogue::Following;
use super::problem::{Axes, Contraction, operand};
use super::schedule::{self, Chosen, tensor_cores};
use super::sizes::product;
use crate::builder::mma::Half;
use crate::kernels::gemm::epilogue::Fate;
use crate::kernels::gemm::{Buffers, Operand, Placed, Product};

impl Turn<'_, '_, '_, '_> {
    pub(super) fn product_on_gpu(&mut self, taken: &Taken) -> Result<(), String> {
        let node = &self.graph.nodes[taken.at];
        let (x, y, result) = (node.operands[0], node.operands[1], node.result());
        let (axes_x, axes_y) = Axes::of_product(&node.op, self.ty(x), self.ty(y));
        let Contraction { m, n, depth, batch } = Contraction::of(self.graph, node);
        let left = self.strided(x, &axes_x);
        let right = self.strided(y, &axes_y);
        let place = self.place(y).clone();
        let half = self.half(&left.1, &place).filter(|_| batch == Extent::Const(1));
        let ((a, left), (b, right)) = match half {
            Some(half) => {
                let packed = self.pack_halves(half, &place, &right.1, (n.clone(), depth.clone()));
                (self.rounded(half, (&m, &depth), left, Some(x)), packed.operand())
            }
            None => {
                let alone = matches!(self.facts.rounds(x), Some((_, true)));
                assert!(!alone, "what only such products read is there for them alone");
                (left, right)
            }
        };
        self.place_taken(taken);
        let axes = Axes::of_result(self.ty(result), self.ty(x), self.ty(y));
        let (c, line, area, first) = self.product_place(result, axes);
        let following = match taken.is_empty() {
            true => Following::default(),
            false => self.epilogue(taken, &Buffers { a, b, c }.list(), true)?,
        };
        let fate = if taken.stays { Fate::Written } else { Fate::Passed };
        let product = Product { m, n, depth, batch, a: left, b: right, c: Placed { line, area, first } };
        self.launch_product(product, half, Buffers { a, b, c }, fate, following);
        Ok(())
    }

    /// In what tensor cores compute the product, if they do.
    fn half(&self, left: &Operand, place_b: &Place) -> Option<Half> {
        tensor_cores(self.module.machine, self.precision(place_b, left.contiguous))
    }

    /// [`Turn::product_of_rows`].
    pub(super) fn rows_on_gpu(
        &mut self,
        (x, m): (BufferId, Extent),
        y: Value,
        rows: Range<u64>,
        transpose_y: bool,
        (out, kept): (BufferId, bool),
    ) {
        let width = product(&self.ty(y).shape[1..]);
        let some = Extent::Const(rows.end - rows.start);
        let (one, zero) = (Extent::Const(1), Extent::Const(0));
        let (n, depth) = if transpose_y { (some, width.clone()) } else { (width.clone(), some) };
        let side = |contiguous, line: Extent, first| {
            let (along, deep) = if contiguous { (one.clone(), line) } else { (line, one.clone()) };
            Operand { area: zero.clone(), along, deep, first, contiguous }
        };
        let left = side(false, depth.clone(), zero.clone());
        let place = self.place(y).clone();
        let half = self.half(&left, &place);
        let ((a, left), (b, right)) = match half {
            Some(half) => {
                let all = product(&self.ty(y).shape[..1]);
                let whole = side(!transpose_y, width.clone(), zero.clone());
                let size = if transpose_y { (all, width) } else { (width, all) };
                let packed = self.pack_halves(half, &place, &whole, size);
                let (column, step) = if transpose_y { (rows.start, 0) } else { (0, rows.start) };
                (self.rounded(half, (&m, &depth), (x, left), None), packed.from(column, step).operand())
            }
            None => {
                let first = Extent::Const(rows.start) * width.clone();
                ((x, left), (place.buffer, side(!transpose_y, width, first)))
            }
        };
        let placed = Placed { line: n.clone(), area: zero.clone(), first: zero.clone() };
        let product = Product { m, n, depth, batch: one.clone(), a: left, b: right, c: placed };
        let fate = if kept { Fate::Added } else { Fate::Written };
        self.launch_product(product, half, Buffers { a, b, c: out }, fate, Following::default());
    }

    fn strided(&mut self, value: Value, axes: &Axes) -> (BufferId, Operand) {
        if operand(&self.view(value), axes).is_none() {
            self.dense(value);
        }
        let operand = operand(&self.view(value), axes).expect("row-major");
        (self.place(value).buffer, operand)
    }

    fn launch_product(
        &mut self,
        product: Product,
        half: Option<Half>,
        Buffers { a, b, c }: Buffers<BufferId>,
        fate: Fate,
        Following { epilogue, buffers, sizes: follows, .. }: Following,
    ) {
        let fours = half.is_some() && self.rows_in_fours(a, &product.a, &product.depth);
        self.label = epilogue.label(&self.label);
        let chosen = schedule::product(&product, (half, fours), fate, epilogue, &self.module.limits);
        let Chosen { schedule, sizes, units, shares } = chosen;
        let elements = product.batch.clone() * product.whole();
        let to = if shares > 1 { self.scratch(vec![Extent::Const(shares), elements.clone()]) } else { c };
        let buffers = [Buffers { a, b, c: to }.list(), buffers].concat();
        self.launch(schedule, buffers, [sizes, follows].concat(), units);
        if shares > 1 {
            self.add_up(to, Extent::Const(shares), elements, c);
        }
    }
}
