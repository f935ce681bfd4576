//! Counterparts in PEFT: declared keys and tensors, inherited keys, and errors in `counterpart` blocks.

use peft_grammar::counterpart::{Consequence, Constant, Counterpart, Part, Rule};
use peft_grammar::model::{ConfigValue, Model};
use peft_grammar::{check, no_imports};

fn model(tune: &str, method: &str) -> Model {
    let spec =
        format!("{method}\nmodel = gpt2(layers: 2, hidden: 8, heads: 2, ffn: 16, vocab: 10)\ntune {{ {tune} }}\n");
    check("spec.peft", &spec, &no_imports).unwrap_or_else(|e| panic!("{e}"))
}

fn refused(method: &str, words: &str) {
    let spec = format!(
        "{method}\nmodel = gpt2(layers: 2, hidden: 8, heads: 2, ffn: 16, vocab: 10)\n\
         tune {{ every attention {{ mine(rank: 2) on q }} }}\n"
    );
    let Err(errors) = check("spec.peft", &spec, &no_imports) else { panic!("{method} is fine") };
    assert!(errors.to_string().contains(words), "should say `{words}`:\n{errors}");
}

/// A user-defined method with this counterpart.
fn mine(counterpart: &str) -> String {
    format!(
        "method mine(rank: int, alpha: float = rank) on projection(x, y) {{\n  \
         weight A \"a\": [rank, width(x)] ~ normal(0.1)\n  \
         weight B \"b\": [width(y), rank] ~ zeros\n  \
         after y {{ y = y + alpha / rank * (x @ transpose(A) @ transpose(B)) }}\n  \
         counterpart \"LORA\" {{\n    {counterpart}\n  }}\n}}\n"
    )
}

fn key<'a>(counterpart: &'a Counterpart, name: &str) -> Option<&'a Rule> {
    counterpart.keys.iter().find(|k| k.name == name).map(|k| &k.rule)
}

#[test]
fn keys_are_inherited_from_methods_of_the_same_type() {
    let model = model("every attention { dora(rank: 2) on q, k, v }", "");
    let [dora] = &model.counterparts[..] else { panic!("one method is at work") };
    assert_eq!((dora.method.as_str(), dora.peft_type.as_str()), ("dora", "LORA"));
    assert!(matches!(key(dora, "r"), Some(Rule::Is { patterns: Some(p), .. }) if p == "rank_pattern"));
    assert!(matches!(key(dora, "megatron_core"), Some(Rule::Free { .. })));
    let parts = dora.conditions.iter().filter_map(|c| match &c.then {
        Consequence::Residual { part, .. } => Some(*part),
        Consequence::Set { .. } => None,
    });
    assert_eq!(parts.collect::<Vec<_>>(), [Part::Svd, Part::Qr]);
}

#[test]
fn user_methods_have_counterparts() {
    let lines = "tensor \"lora_A.weight\" [rank, inputs] is A\n    \
        tensor \"lora_B.weight\" [outputs, rank] is alpha / rank * B elsewhere 0";
    let model = model("every attention { mine(rank: 2) on q }", &mine(lines));
    let [own] = &model.counterparts[..] else { panic!("one method is at work") };
    assert_eq!(own.tensors.len(), 2);
    assert_eq!((own.tensors[0].weight.as_str(), own.tensors[1].elsewhere), ("a", Some(0.0)));
    // `lora` and `dora` disagree about this key, so it is inherited only as off.
    let no = [Constant::Value(ConfigValue::Bool(false))];
    let off = |rule: &Rule| matches!(rule, Rule::Is { values, .. } if values[..] == no);
    assert!(key(own, "use_dora").is_some_and(off) && key(own, "r").is_some());
    // The variables of the model that keys refer to are recorded at each site.
    let spec = "model = bert(layers: 2, hidden: 8, heads: 2, ffn: 16, vocab: 10)\n\
        tune { every attention { prefix(length: 3, direct: true) } }\n";
    let model = check("spec.peft", spec, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    let prefix = &model.applied[0];
    assert_eq!(prefix.model_values.get("layers"), Some(&ConfigValue::Int(2)));
    let why = prefix.peft_obstacle.as_deref().unwrap_or_default();
    assert!(why.contains("positions on from a prefix") && why.contains("first_position: 3"), "{why}");
}

#[test]
fn invalid_counterpart_lines_are_rejected() {
    refused(&mine("key \"r\" is ran"), "there is no variable `ran`");
    refused(&mine("tensor \"t\" [rank, input] is A"), "no parameter `input`");
    refused(&mine("tensor \"t\" [rank, inputs] is C"), "declares no weight `C`");
    refused(&mine("tensor \"t\" [rank, inputs, outputs] is A"), "two axes at most");
    refused(&mine("when \"u\" is true { W = W * 2 }"), "not a residual of `W`");
    refused(&mine("when \"u\" is true { beta = 2 }"), "no parameter `beta`");
    refused(&mine("key \"r\" is rank } counterpart \"IA3\" {"), "one counterpart");
}

#[test]
fn backbone_tensors_train_by_pattern() {
    let model = model("every attention { lora(rank: 2) on q } train \"*.c_attn.bias\"", "");
    let trained = model.params.iter().filter(|p| p.trained_rows().is_some() && p.name.ends_with("c_attn.bias")).count();
    assert_eq!(trained, 2);
}
