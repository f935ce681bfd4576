//! Executes the matrix instructions of a whole warp: `wmma`, `mma`, `ldmatrix`.

use std::sync::Arc;

use crate::arithmetic::Lanes;
use crate::error::FaultKind;
use crate::launch::Machine;
use crate::matrix::{self, Fragment, FragmentLayout};
use crate::memory::space_of;
use crate::program::*;
use crate::race::{AccessContext, Accessor};
use crate::types::Space;
use crate::warp::{LaneFault, LaneResult, Warp, at};

/// The kind of access of `ldmatrix` in race checks, next to those of the `wmma` fragments.
const TILES: u32 = 15;

/// Addresses of the contiguous pieces (rows or columns) of a matrix in memory.
struct Pieces {
    space: Space,
    starts: Vec<u64>,
    /// Number of elements in a piece, and bytes of an element.
    length: usize,
    bytes: usize,
}

impl Warp {
    fn pieces(&self, machine: &Machine, access: &MatrixAccess, active: u32) -> LaneResult<Pieces> {
        self.require_all_lanes(active)?;
        let addresses = self.addresses(machine, access.address);
        if let Some(lane) = (0..32).find(|&lane| addresses[lane] != addresses[0]) {
            return Err(LaneFault { lane, kind: FaultKind::NotUniform });
        }
        let (space, start) = match access.space {
            Space::Generic => space_of(addresses[0]),
            space => (space, addresses[0]),
        };
        if !matches!(space, Space::Global | Space::Shared) {
            let kind = FaultKind::Unmodelled("a matrix in neither global nor shared memory");
            return Err(LaneFault { lane: 0, kind });
        }
        let fragment = &access.fragment;
        let (rows, columns) = (fragment.rows(), fragment.columns());
        let (count, length) = if access.column_major { (columns, rows) } else { (rows, columns) };
        let stride = match access.stride {
            Some(stride) => self.uniform(machine, stride, active)?,
            None => length as u64,
        };
        let bytes = fragment.float.bits() as usize / 8;
        // The matrix must be aligned to the size of a fragment (PTX ISA, matrix storage); its rows too, or as the
        // options say.
        let whole = fragment.registers() as u64 * 4;
        let each = whole.min(machine.options.matrix_row_alignment);
        let starts: Vec<u64> = (0..count as u64).map(|n| start.wrapping_add(n * stride * bytes as u64)).collect();
        for (n, &address) in starts.iter().enumerate() {
            let align = if n == 0 { whole } else { each };
            if !address.is_multiple_of(align) {
                return Err(LaneFault { lane: 0, kind: FaultKind::Misaligned { space, address, align } });
            }
        }
        Ok(Pieces { space, starts, length, bytes })
    }

    fn matrix_context(&self, machine: &Machine, kind: u32) -> AccessContext {
        self.context(machine, Accessor::matrix(self.index, kind))
    }

    pub fn load_matrix(&mut self, machine: &mut Machine, access: &MatrixAccess, active: u32) -> LaneResult<()> {
        let pieces = self.pieces(machine, access, active)?;
        let context = self.matrix_context(machine, access.fragment.index());
        let columns = access.fragment.columns();
        let mut elements = vec![0; access.fragment.rows() * columns];
        let mut data = vec![0; pieces.length * pieces.bytes];
        for (n, &start) in pieces.starts.iter().enumerate() {
            at(0, machine.read_region(pieces.space, start, 1, false, &context, &mut data))?;
            for (m, bytes) in data.chunks(pieces.bytes).enumerate() {
                let (row, column) = if access.column_major { (m, n) } else { (n, m) };
                elements[row * columns + column] = from_bytes(bytes);
            }
        }
        machine.account_pieces(pieces.space, &pieces.starts, data.len(), false, self.line);
        let spread = machine.layout(&access.fragment);
        for (operand, value) in access.registers.iter().zip(spread.scatter(&elements)) {
            if let Operand::Register(slot) = *operand {
                self.set(slot, active, &value);
            }
        }
        Ok(())
    }

    pub fn store_matrix(&mut self, machine: &mut Machine, access: &MatrixAccess, active: u32) -> LaneResult<()> {
        let pieces = self.pieces(machine, access, active)?;
        let context = self.matrix_context(machine, access.fragment.index());
        let columns = access.fragment.columns();
        let elements = self.gather(machine, &access.fragment, &access.registers)?;
        for (n, &start) in pieces.starts.iter().enumerate() {
            let mut data = vec![];
            for m in 0..pieces.length {
                let (row, column) = if access.column_major { (m, n) } else { (n, m) };
                data.extend(&elements[row * columns + column].to_le_bytes()[..pieces.bytes]);
            }
            at(0, machine.write_region(pieces.space, start, 1, &context, &data))?;
        }
        machine.account_pieces(pieces.space, &pieces.starts, pieces.length * pieces.bytes, true, self.line);
        Ok(())
    }

    fn gather(&self, machine: &mut Machine, fragment: &Fragment, registers: &[Operand]) -> LaneResult<Vec<u64>> {
        let spread: Arc<FragmentLayout> = machine.layout(fragment);
        let registers: Vec<Lanes> = registers.iter().map(|&operand| self.value(machine, operand)).collect();
        let gathered = spread.gather(&registers, fragment.rows() * fragment.columns());
        gathered.ok_or(LaneFault { lane: 0, kind: FaultKind::Fragment })
    }

    pub fn multiply(&mut self, machine: &mut Machine, multiply: &Multiply, active: u32) -> LaneResult<()> {
        self.require_all_lanes(active)?;
        let mut elements = |(fragment, registers): &(Fragment, Vec<Operand>)| {
            let bits = self.gather(machine, fragment, registers)?;
            Ok(bits.into_iter().map(|bits| fragment.float.decode(bits)).collect::<Vec<f64>>())
        };
        let (a, b, c) = (elements(&multiply.a)?, elements(&multiply.b)?, elements(&multiply.c)?);
        let (fragment, registers) = &multiply.d;
        let d = matrix::multiply(multiply.shape, &a, &b, &c, fragment.float, machine.perturbation());
        let spread = machine.layout(fragment);
        for (&slot, value) in registers.iter().zip(spread.scatter(&d)) {
            self.set(slot, active, &value);
        }
        let shape = multiply.shape;
        machine.report.matrix_flops += 2 * (shape.m * shape.n * shape.k) as u64;
        Ok(())
    }

    pub fn load_tiles(
        &mut self,
        machine: &mut Machine,
        results: &[u32],
        address: Address,
        transposed: bool,
        active: u32,
    ) -> LaneResult<()> {
        self.require_all_lanes(active)?;
        let addresses = self.addresses(machine, address);
        let context = self.matrix_context(machine, TILES);
        for (tile, &slot) in results.iter().enumerate() {
            // Lanes 8·tile to 8·tile + 7 hold the addresses of the rows.
            let rows = &addresses[8 * tile..8 * tile + 8];
            let mut elements = [[0; 8]; 8];
            for (row, &start) in rows.iter().enumerate() {
                let mut data = [0; 16];
                at(8 * tile + row, machine.read_region(Space::Shared, start, 16, false, &context, &mut data))?;
                for (column, bytes) in data.chunks(2).enumerate() {
                    elements[row][column] = from_bytes(bytes);
                }
            }
            let value: Lanes = std::array::from_fn(|lane| {
                let element = |column: usize| {
                    let row = lane / 4;
                    if transposed { elements[column][row] } else { elements[row][column] }
                };
                element(2 * (lane % 4)) | element(2 * (lane % 4) + 1) << 16
            });
            machine.account_pieces(Space::Shared, rows, 16, false, self.line);
            self.set(slot, active, &value);
        }
        Ok(())
    }
}

fn from_bytes(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}
