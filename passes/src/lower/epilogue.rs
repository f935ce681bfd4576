//! What a kernel takes along, with its arguments ([`crate::kernels::epilogue`]).

use peft_grammar::graph::{Node, Op, Value};
use peft_runtime::artifact::{BufferId, Extent};

use super::dispatch::Taken;
use super::entry::Turn;
use super::sizes::dim_extent;
use super::view::View;
use crate::kernels::epilogue::{Epilogue, Group, Sum};

/// An epilogue on its way, with its arguments.
#[derive(Default)]
pub(super) struct Following {
    pub epilogue: Epilogue,
    /// What its groups make.
    results: Vec<Value>,
    /// Beyond the kernel's own.
    pub buffers: Vec<BufferId>,
    pub sizes: Vec<Extent>,
}

impl Following {
    /// Which of the kernel's buffers it is, the first of which are its `own`.
    fn number(&mut self, own: &[BufferId], buffer: BufferId) -> usize {
        let known = own.iter().chain(&self.buffers).position(|&b| b == buffer);
        known.unwrap_or_else(|| {
            self.buffers.push(buffer);
            own.len() + self.buffers.len() - 1
        })
    }

    fn numbers(&mut self, own: &[BufferId], buffers: &[BufferId]) -> Vec<usize> {
        buffers.iter().map(|&buffer| self.number(own, buffer)).collect()
    }
}

impl Turn<'_, '_, '_, '_> {
    /// Finds a place for the result of what takes others along in registers: what is not written has one all the same,
    /// that of what is made of it.
    pub(super) fn place_taken(&mut self, taken: &Taken) {
        let result = self.graph.nodes[taken.at].result();
        if let Some(sum) = &taken.sum {
            self.place_taken(sum);
            if sum.stays {
                self.result(self.graph.nodes[sum.at].result());
            }
        }
        if !taken.stays {
            let written = taken.followers.iter().find(|&&root| self.facts.written(root, taken));
            let (buffer, view) = match (written, &taken.sum) {
                (Some(&root), _) => self.target(self.graph.nodes[root].result()),
                (None, Some(sum)) => {
                    (self.place(self.graph.nodes[sum.at].result()).buffer, View::dense(&self.ty(result).shape))
                }
                (None, None) => unreachable!("something reads it"),
            };
            self.show(result, buffer, view);
        }
    }

    /// What a kernel takes along, whose own buffers are `own`; if it has its result in `registers`, the groups do not
    /// read it.
    pub(super) fn epilogue(&mut self, taken: &Taken, own: &[BufferId], registers: bool) -> Result<Following, String> {
        let product = self.graph.nodes[taken.at].result();
        let batched = self.ty(product).rank() == 3 && (registers || !taken.followers.is_empty());
        let mut following = Following { epilogue: Epilogue { batched, ..Epilogue::default() }, ..Following::default() };
        for &root in &taken.followers {
            let result = self.graph.nodes[root].result();
            let rounds = self.facts.rounds(result).filter(|_| registers);
            let stays = self.facts.written(root, taken) && !matches!(rounds, Some((_, true)));
            let nowhere = (!stays).then(|| self.place(product).buffer);
            if let Some(buffer) = nowhere {
                self.show(result, buffer, View::dense(&self.ty(result).shape));
            }
            let map = self.expression(root, true, nowhere)?;
            let groups = &following.epilogue.groups;
            let early = groups.iter().take_while(|g| !g.form.draws).count();
            let turn = match registers {
                false if groups.len() > early || map.expression.draws => early,
                _ => 0,
            };
            let maker = |v: &Value| {
                let results = following.results[turn..].iter().copied();
                registers.then_some(product).into_iter().chain(results).position(|made| made == *v)
            };
            let made = map.arrays.iter().map(maker).collect();
            let buffers = following.numbers(own, &map.buffers);
            let half = rounds.filter(|_| self.place(result).view.is_none() || !stays).map(|(half, _)| {
                let room = self.room_rounded(result);
                (half, following.number(own, room))
            });
            following.epilogue.groups.push(Group { form: map.expression, buffers, made, stays, half });
            following.results.push(result);
            following.sizes.extend(map.sizes);
        }
        if let Some(sum) = &taken.sum {
            let graph = self.graph;
            let Node { op, operands, .. } = &graph.nodes[sum.at];
            let result = graph.nodes[sum.at].result();
            let made = [product].into_iter().chain(following.results.iter().copied());
            let of = made.into_iter().position(|made| made == operands[0]).expect("what it is of");
            let out = sum.stays.then(|| following.number(own, self.place(result).buffer));
            let then = self.epilogue(sum, &[own, &following.buffers].concat(), true)?;
            following.buffers.extend(then.buffers);
            let rows = self.ty(result).shape.iter().rev().nth(1);
            following.sizes.push(dim_extent(*rows.expect("rows of one column")));
            following.sizes.extend(then.sizes);
            let mean = matches!(op, Op::Reduce { mean: true, .. });
            following.epilogue.sum = Some(Box::new(Sum { of, mean, out, then: then.epilogue }));
        }
        for &root in &taken.companions {
            let result = self.graph.nodes[root].result();
            let map = self.expression(root, true, None)?;
            let buffers = following.numbers(own, &map.buffers);
            let group = Group { form: map.expression, buffers, made: vec![], stays: true, half: None };
            following.epilogue.companions.push(group);
            following.sizes.push(dim_extent(*self.ty(result).shape.last().expect("rows")));
            following.sizes.extend(map.sizes);
        }
        Ok(following)
    }
}
