//! What is cheap to compute again is not kept from the forward to the backward pass.
//!
//! An element-by-element result that is read again far away, while all it is made of is alive there
//! anyway, is made a second time. Dropout above all: its mask comes from a counter, never from memory.

use std::collections::HashMap;

use peft_grammar::graph::{Graph, Node, Value};

use crate::fuse::Limits;
use crate::lower::maps;

pub fn remat(graph: &Graph, limits: &Limits) -> Result<Graph, String> {
    let mut last = vec![0; graph.values()];
    for (at, node) in graph.nodes.iter().enumerate() {
        node.operands.iter().for_each(|v| last[v.0 as usize] = at);
    }
    graph.outputs.iter().for_each(|(_, v)| last[v.0 as usize] = usize::MAX);
    graph.args.iter().for_each(|a| last[a.value.0 as usize] = usize::MAX);
    let maker: HashMap<Value, usize> = graph.nodes.iter().enumerate().map(|(at, n)| (n.result, at)).collect();
    let output = |v: Value| graph.outputs.iter().any(|(_, o)| *o == v);

    let mut new = Graph::new(graph.name.clone());
    let mut map: Vec<Value> = vec![Value(0); graph.values()];
    // Where each value was made last, by operations of the old graph.
    let mut made = vec![0; graph.values()];
    for arg in &graph.args {
        map[arg.value.0 as usize] = new.arg(arg.name.clone(), arg.role, arg.rows, graph.ty(arg.value).clone());
    }
    for (at, Node { op, operands, result, location }) in graph.nodes.iter().enumerate() {
        for &operand in operands {
            let Some(source) = maker.get(&operand).map(|&s| &graph.nodes[s]) else { continue };
            let far = at - made[operand.0 as usize] > limits.far;
            let alive = |v: &Value| last[v.0 as usize] >= at;
            let cheap = maps(&source.op) && !source.operands.is_empty() && !output(operand);
            if far && cheap && source.operands.iter().all(alive) {
                let again: Vec<Value> = source.operands.iter().map(|v| map[v.0 as usize]).collect();
                map[operand.0 as usize] = new.push(source.op.clone(), &again, &source.location)?;
                made[operand.0 as usize] = at;
            }
        }
        let operands: Vec<Value> = operands.iter().map(|v| map[v.0 as usize]).collect();
        map[result.0 as usize] = new.push(op.clone(), &operands, location)?;
        made[result.0 as usize] = at;
    }
    new.outputs = graph.outputs.iter().map(|(name, v)| (name.clone(), map[v.0 as usize])).collect();
    Ok(new)
}
