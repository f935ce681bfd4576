//! Graphs through MLIR's text and back.

use super::samples::{cases, single};
use crate::dialect::Dialect;
use crate::gradient::differentiate;

#[test]
fn every_operation_survives_print_and_parse() {
    let dialect = Dialect::new().expect("a dialect");
    for (op, types) in cases(2, 3, 2) {
        let graph = differentiate(&single(op, &types)).expect("differentiable");
        let text = dialect.print(&[&graph]).expect("valid");
        let back = dialect.read(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(dialect.print(&[&back[0]]).expect("valid"), text);
        assert_eq!(back[0].nodes.len(), graph.nodes.len());
        for (a, b) in graph.nodes.iter().zip(&back[0].nodes) {
            assert_eq!(a.op, b.op);
        }
    }
}

#[test]
fn locations_survive() {
    let dialect = Dialect::new().expect("a dialect");
    let (op, types) = cases(2, 3, 2).remove(0);
    let mut graph = single(op, &types);
    graph.nodes[0].location.file = "methods/lora.peft".into();
    (graph.nodes[0].location.line, graph.nodes[0].location.column) = (7, 3);
    let text = dialect.print_with_locations(&[&graph]).expect("valid");
    assert_eq!(dialect.read(&text).expect("valid")[0].nodes[0].location, graph.nodes[0].location);
}

#[test]
fn mlir_itself_refuses_what_the_dialect_does_not_allow() {
    let dialect = Dialect::new().expect("a dialect");
    let module = |body: &str| {
        format!(
            "module {{ func.func @f(%x: tensor<2xf32> {{peft.name = \"x\", peft.role = \"input\"}}) {{ {body} return }} }}"
        )
    };
    let refuse = |body: &str| dialect.read(&module(body)).expect_err("refused").to_string();
    assert!(
        refuse(r#"%0 = "peft.tanh"(%x, %x) : (tensor<2xf32>, tensor<2xf32>) -> tensor<2xf32>"#).contains("operand")
    );
    assert!(refuse(r#"%0 = "peft.scale"(%x) : (tensor<2xf32>) -> tensor<2xf32>"#).contains("by"));
    assert!(refuse(r#"%0 = "peft.nonsense"(%x) : (tensor<2xf32>) -> tensor<2xf32>"#).contains("nonsense"));
    // What IRDL cannot say, our own verifier does.
    assert!(refuse(r#"%0 = "peft.tanh"(%x) : (tensor<2xf32>) -> tensor<3xf32>"#).contains("f32[2]"));
}
