//! The rewriter that every rewriting pass uses. It rebuilds a graph operation by operation, and a rule may replace an
//! operation by a cheaper value. Common subexpressions are computed once, and dead operations are dropped.

use std::collections::{HashMap, HashSet};

use peft_grammar::graph::{Graph, Location, Node, Op, Value};

/// A new graph under construction.
pub struct Rewriter {
    /// The operations appended so far.
    pub graph: Graph,
    /// The results of operations computed so far, by operation and operands.
    known: HashMap<(Op, Vec<Value>), Vec<Value>>,
    /// Where the operation that is being rewritten comes from.
    location: Location,
    /// The fusion rule that is being applied; empty in other passes.
    rule: &'static str,
    /// New values of the old graph's outputs.
    outputs: HashSet<Value>,
}

/// Rebuilds `graph`. `rule` sees every operation with its operands in the new graph and may give another value for its
/// result, which then bears the result's name; operations of several results are kept.
///
/// # Errors
/// Those of `rule`, and operands that do not fit an operation.
pub fn rewrite(
    graph: &Graph,
    mut rule: impl FnMut(&mut Rewriter, &Op, &[Value]) -> Result<Option<Value>, String>,
) -> Result<Graph, String> {
    let mut new = Rewriter {
        graph: Graph::new(graph.name.clone()),
        known: HashMap::new(),
        location: Location::default(),
        rule: "",
        outputs: HashSet::new(),
    };
    let given: HashSet<Value> = graph.outputs.iter().map(|(_, v)| *v).collect();
    let mut map: Vec<Option<Value>> = vec![None; graph.value_count()];
    for arg in &graph.args {
        let value = new.graph.arg(arg.name.clone(), arg.role, arg.rows, graph.ty(arg.value).clone());
        map[arg.value.0 as usize] = Some(value);
    }
    for Node { op, operands, results, location } in &graph.nodes {
        let operands: Vec<Value> = operands.iter().map(|v| map[v.0 as usize].expect("verified order")).collect();
        new.location = location.clone();
        let better = if results.len() == 1 { rule(&mut new, op, &operands)? } else { None };
        let values = match better {
            Some(value) => {
                new.graph.name_value(value, &location.name);
                vec![value]
            }
            None => new.results(op.clone(), &operands, location.clone())?,
        };
        for (result, value) in results.iter().zip(values) {
            map[result.0 as usize] = Some(value);
            if given.contains(result) {
                new.outputs.insert(value);
            }
        }
    }
    new.graph.outputs =
        graph.outputs.iter().map(|(name, v)| (name.clone(), map[v.0 as usize].expect("verified"))).collect();
    Ok(live(&new.graph))
}

impl Rewriter {
    /// The operations appended from here on bear the name of this rule.
    pub fn set_rule(&mut self, rule: &'static str) {
        self.rule = rule;
    }

    /// Appends an operation of one result for the rule that is being applied, or finds the value that is the same.
    ///
    /// # Errors
    /// Operands that do not fit the operation.
    pub fn op(&mut self, op: Op, operands: &[Value]) -> Result<Value, String> {
        let mut location = self.location.unnamed();
        if !self.rule.is_empty() {
            location.rule = self.rule.into();
        }
        self.results(op, operands, location).map(|results| results[0])
    }

    fn results(&mut self, op: Op, operands: &[Value], location: Location) -> Result<Vec<Value>, String> {
        let key = (op, operands.to_vec());
        if let Some(values) = self.known.get(&key) {
            return Ok(values.clone());
        }
        let values = self.graph.push_node(key.0.clone(), operands, &location)?.results.clone();
        self.known.insert(key, values.clone());
        Ok(values)
    }

    /// The operation that computes `value`, with its operands; `None` for an argument.
    pub fn source(&self, value: Value) -> Option<(Op, Vec<Value>)> {
        self.graph.def(value).map(|node| (node.op.clone(), node.operands.clone()))
    }

    /// `value` is an output of the graph.
    pub fn is_output(&self, value: Value) -> bool {
        self.outputs.contains(&value)
    }
}

/// `graph` without operations that no output depends on. All arguments are kept.
pub fn live(graph: &Graph) -> Graph {
    let mut needed = vec![false; graph.value_count()];
    graph.outputs.iter().for_each(|(_, v)| needed[v.0 as usize] = true);
    for node in graph.nodes.iter().rev() {
        if node.results.iter().any(|v| needed[v.0 as usize]) {
            node.operands.iter().for_each(|v| needed[v.0 as usize] = true);
        }
    }
    let mut new = Graph::new(graph.name.clone());
    let mut map = vec![Value(0); graph.value_count()];
    for arg in &graph.args {
        map[arg.value.0 as usize] = new.arg(arg.name.clone(), arg.role, arg.rows, graph.ty(arg.value).clone());
    }
    for node in graph.nodes.iter().filter(|n| n.results.iter().any(|v| needed[v.0 as usize])) {
        let operands: Vec<Value> = node.operands.iter().map(|v| map[v.0 as usize]).collect();
        let made = new.push_node(node.op.clone(), &operands, &node.location).expect("it was well-formed");
        node.results.iter().zip(&made.results).for_each(|(old, new)| map[old.0 as usize] = *new);
    }
    new.outputs = graph.outputs.iter().map(|(name, v)| (name.clone(), map[v.0 as usize])).collect();
    new
}
