//! Work element by element on a product, done by the product's kernel: a unit has its part of the result in the cache
//! when the last block of k is in, and goes over it row by row.
//!
//! ```text
//! u = x @ W + b,  a = gelu(u)          one kernel, which writes u and a; x @ W alone is not written
//! ```
//!
//! A group (see [`super::map`]) joins the last of the products among its leaves.

use peft_grammar::graph::Value;
use peft_runtime::artifact::{BufferId, Element, Extent};

use super::kernel::{Buf, Kernel, Val};
use super::{Lowering, map};

/// Groups of one product, at most.
const MOST: usize = 3;

/// What a product's kernel does with its result, and what it gets for that.
#[derive(Default)]
pub(super) struct Epilogue {
    groups: Vec<Group>,
    /// Beyond the product's own.
    pub buffers: Vec<BufferId>,
    pub elements: Vec<Element>,
    pub sizes: Vec<Extent>,
}

struct Group {
    form: map::Form,
    /// Which of the kernel's buffers are the group's, and how many of the sizes.
    buffers: Vec<usize>,
    sizes: usize,
}

impl Epilogue {
    /// What the kernel's name says of it.
    pub fn suffix(&self) -> String {
        self.groups.iter().fold(String::new(), |name, group| {
            let places: Vec<String> = group.buffers.iter().map(usize::to_string).collect();
            format!("{name}_{}_{}", group.form.name(), places.join("_"))
        })
    }

    /// For profiles.
    pub fn label(&self, product: &str) -> String {
        self.groups.iter().fold(product.to_string(), |label, group| format!("{label}+{}", group.form.label()))
    }

    /// Some rows of the result, which is `width` wide, from the first on; of them the columns that `span` gives. `sizes`
    /// are the groups' own.
    pub fn write(
        &self,
        k: &mut Kernel,
        buffers: &[Buf],
        sizes: &[Val],
        (first, rows): (Val, Val),
        width: Val,
        span: impl FnOnce(&mut Kernel) -> (Val, Val),
    ) {
        if self.groups.is_empty() {
            return;
        }
        let columns = span(k);
        let zero = k.index(0);
        k.each(zero, rows, 1, |k, row| {
            let row = k.add(first, row);
            let mut rest = sizes;
            for group in &self.groups {
                let own: Vec<Buf> = group.buffers.iter().map(|&at| buffers[at]).collect();
                let (sizes, others) = rest.split_at(group.sizes);
                group.form.write_row(k, &own, sizes, &[row], width, columns);
                rest = others;
            }
        });
    }
}

impl Lowering<'_, '_, '_> {
    /// The groups that the product of node `at` takes along, in their order. What else they read is there already.
    pub(super) fn followers(&self, at: usize) -> Vec<usize> {
        let product = self.graph.nodes[at].result;
        let ty = self.ty(product);
        let mut roots = vec![];
        if !self.target.epilogues || self.frozen.is_some() || self.wanted.contains_key(&product) || ty.rank() != 2 {
            return roots;
        }
        let mut made = vec![product];
        let there = |v: &Value, made: &[Value]| made.contains(v) || self.groups.maker(*v).is_none_or(|n| n < at);
        while roots.len() < MOST {
            let readers = made.iter().flat_map(|v| &self.readers[v.0 as usize]);
            let readers = readers.filter(|&&node| map::maps(&self.graph.nodes[node].op));
            let next = readers.map(|&node| self.groups.root(node)).filter(|root| {
                let alike = self.ty(self.graph.nodes[*root].result) == ty;
                let leaves = self.groups.leaves(self.graph, *root);
                alike && !self.joined.contains(root) && !roots.contains(root) && leaves.iter().all(|v| there(v, &made))
            });
            let Some(root) = next.min() else { break };
            roots.push(root);
            made.push(self.graph.nodes[root].result);
        }
        roots
    }

    /// The groups of `roots` as a product's kernel takes them, whose own buffers are `own`.
    pub(super) fn epilogue(&mut self, roots: &[usize], own: &[BufferId]) -> Result<Epilogue, String> {
        let mut epilogue = Epilogue::default();
        for &root in roots {
            let map = self.expression(root, true)?;
            let mut buffers = vec![];
            for (buffer, element) in map.buffers.into_iter().zip(map.elements) {
                let known = own.iter().chain(&epilogue.buffers).position(|&b| b == buffer);
                buffers.push(known.unwrap_or(own.len() + epilogue.buffers.len()));
                if known.is_none() {
                    epilogue.buffers.push(buffer);
                    epilogue.elements.push(element);
                }
            }
            epilogue.groups.push(Group { form: map.form, buffers, sizes: map.sizes.len() });
            epilogue.sizes.extend(map.sizes);
            self.joined.insert(root);
        }
        Ok(epilogue)
    }
}
