//! The outputs of the front end: rendered diagnostics, the text of models, JSON round trips, and overrides.

use peft_grammar::ast::Ast;
use peft_grammar::graph::{Op, Role};
use peft_grammar::model::{
    BatchSize, Buffer, ConfigValue, Every, Extent, KeyRule, Model, Origin, Phase, Piece, Schedule, TaskKind,
    TensorKind, Trainable, template_source,
};
use peft_grammar::{check, compile_with, library, no_imports, parse};

const TINY: &str = include_str!("../../tests/specs/good/inducer_lora.peft");

fn tiny(overrides: &[(&str, &str)]) -> Model {
    let overrides: Vec<(String, String)> = overrides.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    compile_with("tiny.peft", TINY, &overrides, &no_imports).unwrap_or_else(|e| panic!("{e}"))
}

fn errors(source: &str) -> String {
    match check("spec.peft", source, &no_imports) {
        Ok(_) => panic!("this spec is fine:\n{source}"),
        Err(e) => format!("{source}\n----\n{e}"),
    }
}

fn refused(overrides: &[(&str, &str)]) -> String {
    let overrides: Vec<(String, String)> = overrides.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    match compile_with("tiny.peft", TINY, &overrides, &no_imports) {
        Ok(_) => panic!("{overrides:?} are fine"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn model_text_of_inducer_with_lora() {
    let source = "model = gpt2(layers: 1, hidden: 8, heads: 2, ffn: 16, vocab: 10, context: 4, embedding_dropout: 0.0)\n\
        tune { every attention { inducer(key: 1, value: 2)  lora(rank: 2, alpha: 4) on q } }\n";
    let model = check("small.peft", source, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    insta::assert_snapshot!(format!("{source}----\n{model}"));
}

#[test]
fn error_in_tune_block() {
    insta::assert_snapshot!(errors(
        "model = gpt2(layers: 2)\n\ntune {\n  every attention {\n    lora(rnak: 4) on q\n    indcer(value: 3)\n  }\n}\n"
    ));
}

#[test]
fn error_in_method_shows_definition_and_use() {
    insta::assert_snapshot!(errors(
        "method gate(bottleneck: int) on attention(out) {\n  weight a \"down\": [bottleneck, width(out)] ~ zeros\n  \
         after out { out = out + out @ a }\n}\n\nmodel = gpt2(layers: 2)\n\n\
         tune {\n  every attention { gate(bottleneck: 10) }\n}\n"
    ));
}

#[test]
fn error_in_library_shows_use() {
    insta::assert_snapshot!(errors("model = gpt2(layers: 2, hidden: 100, heads: 12)\n"));
}

#[test]
fn syntax_error_in_unclosed_block() {
    insta::assert_snapshot!(errors("model = gpt2(layers: 2)\n\ntune {\n  every attention { lora(rank: 4) on q\n}\n"));
}

#[test]
fn invalid_overrides_are_reported() {
    insta::assert_snapshot!(refused(&[
        ("train.stepz", "20"),
        ("lorra.rank", "4"),
        ("model.layers", "two"),
        ("steps", "3")
    ]));
}

#[test]
fn colour_only_on_request() {
    let Err(errors) = check("spec.peft", "model = gtp2()", &no_imports) else { panic!("there is no gtp2") };
    assert!(!errors.render(false).contains('\u{1b}'));
    assert!(errors.render(true).contains('\u{1b}'));
}

#[test]
fn syntax_tree_json_round_trips() {
    for (path, text) in library::MODULES {
        let tree = parse(path, text).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(Ast::from_json(&tree.to_json()).expect("it reads back"), tree, "{path}");
    }
}

#[test]
fn overrides_apply_to_every_block() {
    let model = tiny(&[
        ("train.steps", "20"),
        ("train.schedule", "constant"),
        ("train.warmup", "0.1"),
        ("model.layers", "1"),
        ("model.vocab", "50"),
        ("lora.rank", "2"),
    ]);
    assert_eq!(model.train.steps, Some(20));
    assert_eq!((model.train.schedule, model.train.warmup), (Schedule::Constant, Phase::Share(0.1)));
    let shape = |name: &str| model.params.iter().find(|p| p.name == name).map(|p| p.shape.clone());
    assert_eq!(shape("transformer.wte.weight"), Some(vec![50, 32]));
    assert_eq!(shape("layers.0.attention.q.lora.a"), Some(vec![2, 32]));
    assert_eq!(shape("layers.1.attention.q.lora.a"), None);
}

#[test]
fn save_intervals() {
    let save = |value: &str| tiny(&[("train.save", value)]).train.save;
    assert_eq!(save("epoch"), Every::Epoch);
    assert_eq!(save("20"), Every::Steps(20));
    assert_eq!([save("90s"), save("10min"), save("\"2h\"")], [90, 600, 7200].map(Every::Seconds));
    assert_eq!([0, 3, 4, 5].map(|step| Every::Steps(4).next(step, 5)), [4, 4, 8, 8].map(Some));
    assert_eq!([0, 4].map(|step| Every::Epoch.next(step, 5)), [Some(5); 2]);
    assert_eq!(Every::Seconds(1).next(0, 5), None);
}

/// The size of a batch is a number of sequences or a number of tokens.
#[test]
fn batch_sizes_in_sequences_and_tokens() {
    let batch = |value: &str| {
        let train = tiny(&[("train.batch", value)]).train;
        let read = train.with(&[]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(train, read);
        (train.batch, serde_json::to_value(train.batch).expect("plain data"))
    };
    assert_eq!(batch("4"), (BatchSize::Sequences(4), serde_json::json!(4)));
    let tokens = (BatchSize::Tokens { tokens: 4096 }, serde_json::json!({"tokens": 4096}));
    assert_eq!((batch("4096 tokens"), batch("4096tokens")), (tokens.clone(), tokens));
}

/// A weight's own rate goes before the rate of its method's application, which goes before the recipe's.
#[test]
fn learning_rate_precedence() {
    let spec = |rates: &str, recipe: &str| {
        format!(
            "model = bert(layers: 1, hidden: 32, heads: 4, ffn: 48, vocab: 97)\n\
             tune {{ every attention {{ lora(rank: 2) on q {rates} }}  bitfit()  head trainable {{ lr: 0.5 }} }}\n\
             train {{ lr: 0.25 {recipe} }}\n"
        )
    };
    let given = |rates: &str, set: &[(&str, &str)]| {
        let set: Vec<(String, String)> = set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let model = compile_with("tiny.peft", &spec(rates, ""), &set, &no_imports).unwrap_or_else(|e| panic!("{e}"));
        let end = |end: &str| {
            let param = model.params.iter().find(|p| p.name.ends_with(end)).expect("there");
            (param.lr, param.lr_factor(&model.train))
        };
        [".lora.a", ".lora.b", "query.bias", "classifier.weight"].map(end)
    };
    let (recipe, head) = ((None, None), (Some(0.5), Some(2.0)));
    let own = |lr: f64, factor: f64| (Some(lr), Some(factor));
    assert_eq!(given("", &[]), [recipe, recipe, recipe, head]);
    assert_eq!(given("{ lr: 0.125 }", &[]), [own(0.125, 0.5), own(0.125, 0.5), recipe, head]);
    assert_eq!(given("{ lr of B: 4.0 }", &[]), [recipe, own(4.0, 16.0), recipe, head]);
    assert_eq!(given("{ lr of B: 4, lr: 1 }", &[]), [own(1.0, 4.0), own(4.0, 16.0), recipe, head]);
    let set = [("lora.lr", "1"), ("lora.lr of B", "2"), ("train.lr", "0.5")];
    assert_eq!(given("{ lr of B: 4 }", &set), [own(1.0, 2.0), own(2.0, 4.0), recipe, (Some(0.5), Some(1.0))]);
}

/// Weight decay applies to matrices, or to all trained tensors.
#[test]
fn weight_decay_scopes() {
    let decaying = |set: &[(&str, &str)]| {
        let model = tiny(set);
        let trained = model.params.iter().filter(|p| p.trainable != Trainable::No && p.name.contains("layers.0"));
        trained.filter(|p| p.decay).map(|p| p.name.rsplit_once("attention.").expect("a site").1.to_owned()).collect()
    };
    let matrices: Vec<String> = decaying(&[]);
    let weights = ["key.down.weight", "key.up.weight", "value.down.weight", "value.up.weight"];
    let expected = ["q.lora.a", "q.lora.b"].map(str::to_owned).into_iter();
    assert_eq!(matrices, expected.chain(weights.map(|name| format!("inducer.{name}"))).collect::<Vec<_>>());
    let all: Vec<String> = decaying(&[("train.weight_decay", "0.1"), ("train.decays", "all")]);
    assert!(all.len() == 11 && all.contains(&"q.lora.bias".to_owned()), "{all:?}");
}

#[test]
fn canonical_names_and_shapes() {
    let model = tiny(&[]);
    let trainable: Vec<String> = model
        .params
        .iter()
        .filter(|p| p.trainable == Trainable::All)
        .map(|p| format!("{} {:?}", p.name, p.shape))
        .collect();
    let layer = |i: usize| {
        [
            ("q.lora.a", "[4, 32]"),
            ("q.lora.b", "[32, 4]"),
            ("q.lora.bias", "[32]"),
            ("inducer.key.down.weight", "[4, 8, 3]"),
            ("inducer.key.down.bias", "[4, 3]"),
            ("inducer.key.up.weight", "[4, 3, 8]"),
            ("inducer.key.up.bias", "[4, 8]"),
            ("inducer.value.down.weight", "[4, 8, 5]"),
            ("inducer.value.down.bias", "[4, 5]"),
            ("inducer.value.up.weight", "[4, 5, 32]"),
            ("inducer.value.up.bias", "[32]"),
        ]
        .map(|(name, shape)| format!("layers.{i}.attention.{name} {shape}"))
    };
    assert_eq!(trainable, [layer(0), layer(1)].concat());
    assert_eq!(model.trainable_elements(), 2752);
    let outputs: Vec<&str> = model.graph.outputs.iter().map(|(name, _)| &**name).collect();
    assert_eq!(outputs, ["loss", "logits", "lambda.0", "lambda.1"]);
    assert!(model.params.iter().all(|p| p.decay == (p.shape.len() > 1 && !p.name.ends_with(".bias"))));
}

#[test]
fn unread_inputs_are_not_arguments() {
    let inputs = |model: &Model| {
        let inputs = model.graph.args.iter().filter(|a| a.role == Role::Input);
        inputs.map(|a| a.name.clone()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(inputs(&tiny(&[])), "ids positions types targets labels");
    assert_eq!(inputs(&tiny(&[("model.token_types", "false")])), "ids positions targets labels");
    assert_eq!(inputs(&tiny(&[("model.dropout", "0.5")])), "ids positions types rng targets labels");
}

#[test]
fn dropouts_have_distinct_streams() {
    let model = tiny(&[("model.dropout", "0.1"), ("model.attention_dropout", "0.2"), ("lora.dropout", "0.3")]);
    let streams = model.graph.nodes.iter().filter_map(|n| match n.op {
        Op::Dropout { stream, .. } => Some(stream),
        _ => None,
    });
    let mut streams: Vec<u32> = streams.collect();
    streams.sort_unstable();
    // Each layer has five dropouts: two on residuals, and one each on attention weights, λ and LoRA's input.
    assert_eq!(streams, (0..10).collect::<Vec<_>>());
}

#[test]
fn trainable_rows_split_the_argument() {
    let source = TINY.replace("tune {", "tune {\n  rows 90..95 of \"transformer.wte.weight\"");
    let model = check("rows.peft", &source, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    let parts: Vec<(String, Role)> =
        model.graph.args.iter().filter(|a| a.rows.is_some()).map(|a| (a.label(), a.role)).collect();
    let part = |rows: &str, role| (format!("transformer.wte.weight[{rows}]"), role);
    assert_eq!(parts, [part("0:90", Role::Frozen), part("90:95", Role::Trainable), part("95:97", Role::Frozen)]);
    let wte = model.params.iter().find(|p| p.name == "transformer.wte.weight").expect("an embedding");
    assert_eq!((&wte.trainable, wte.trainable_elements()), (&Trainable::Rows(90, 95), 5 * 32));
}

#[test]
fn task_head_trains_unless_frozen() {
    let source = include_str!("../../tests/specs/good/classifier.peft");
    let trains = |source: &str| {
        let model = check("head.peft", source, &no_imports).unwrap_or_else(|e| panic!("{e}"));
        let head: Vec<Trainable> =
            model.params.iter().filter(|p| p.origin == Origin::Head).map(|p| p.trainable.clone()).collect();
        head
    };
    assert_eq!(trains(source), [Trainable::All, Trainable::All]);
    assert_eq!(trains(&source.replace("head trainable", "head frozen")), [Trainable::No, Trainable::No]);
    assert_eq!(trains(&source.replace("  head trainable\n", "")), [Trainable::All, Trainable::All]);
}

#[test]
fn template_is_parsed_into_pieces() {
    let source = include_str!("../../models/paper/webnlg/inducer_lora.peft");
    let model = check("webnlg.peft", source, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    let TaskKind::Generation { special, template, target, .. } = &model.task.kind else { panic!("it generates") };
    assert_eq!((special.len(), &**target), (16, "<target_webnlg>"));
    assert_eq!((special[10].as_str(), special[15].as_str()), ("<bos_webnlg>", "<target_webnlg>"));
    let token = |t: &str| Piece::Special(t.into());
    let field = |f: &str| Piece::Field(f.into());
    let triple = vec![
        token("<subject>"),
        field("subject"),
        token("<property>"),
        field("property"),
        token("<object>"),
        field("object"),
    ];
    let whole =
        [token("<bos_webnlg>"), Piece::Repeat(triple), token("<target_webnlg>"), field("text"), token("<eos_webnlg>")];
    assert_eq!(template[..], whole);
}

/// What the examples of the language reference mean; `tests/suite/documents.rs` checks that each of them is accepted.
#[test]
fn the_examples_of_the_language_reference_check() {
    let page = include_str!("../../docs/language.md");
    let blocks = || page.split("\n```").skip(1).step_by(2).filter_map(|block| block.split_once('\n'));
    let block = |language: &str, words: &str| {
        let found = blocks().find(|(fence, text)| *fence == language && text.contains(words));
        found.unwrap_or_else(|| panic!("the page has a block with `{words}`")).1
    };
    let spec = block("peft", "head frozen");
    check("page.peft", spec, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    let names = format!("{}\nmodel = roberta()\ntune {{ full() }}", block("peft", "import tasks.mnli"));
    let model = check("page.peft", &names, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((&*model.task.name, model.task.max_tokens, model.train.batch), ("mnli", 512, BatchSize::Sequences(32)));
    let packed = format!("{}\nmodel = gpt2()", block("peft", "pack: true"));
    let model = check("page.peft", &packed, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    assert!(matches!(model.task.kind, TaskKind::Generation { pack: true, .. }));
    let method = block("peft", "method lora");
    let model = check("page.peft", method, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    assert!(model.params.iter().any(|p| p.name == "layers.0.attention.q.lora.a" && p.shape == [3, 768]));
    let checkpoint = block("peft-fragment", "checkpoint {");
    let backbone = format!(
        "backbone page(width: int = 8 from \"n_embd\", tied: bool = true) for generation {{ {checkpoint}
           weight e \"embed\": [10, width] ~ normal(0.02)
           x = e[ids]
           y = x[targets]
           logits = y @ transpose(e)
           output logits
           output loss = mean(cross_entropy(logits, labels)) }}
         model = page()"
    );
    let model = check("page.peft", &backbone, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(model.backbone.checkpoint.tensors.len(), 6);
}

#[test]
fn errors_of_all_blocks_are_reported_at_once() {
    let source = "model = gpt2(layer: 2)\ntune { every attention { lorra(rank: 4) on q } }\ntrain { bacth: 4 }\n";
    let Err(errors) = check("spec.peft", source, &no_imports) else { panic!("it has three errors") };
    let hints: Vec<&str> = errors.list.iter().filter_map(|e| e.hint.as_deref()).collect();
    assert_eq!(hints, ["did you mean `layers`?", "did you mean `lora`?", "did you mean `batch`?"]);
}

/// The `checkpoint` block of a user-defined backbone, with the arguments substituted.
#[test]
fn checkpoint_block_is_evaluated() {
    let source = include_str!("../../tests/specs/good/own_backbone.peft");
    let model = check("own.peft", source, &no_imports).unwrap_or_else(|e| panic!("{e}"));
    let found = &model.backbone.checkpoint;
    assert_eq!((&found.model_types[..], &found.prefix[..]), (&["bag".to_string()][..], "bag."));
    let is = |values: serde_json::Value, note: &str| KeyRule::Is {
        values: values.as_array().expect("a list").clone(),
        note: Some(note.into()),
    };
    let argument =
        |name: &str, absent: i64| KeyRule::Argument { name: name.into(), absent: Some(ConfigValue::Int(absent)) };
    let keys = [
        ("vocab_size", argument("vocab", 100)),
        ("hidden_size", argument("width", 16)),
        ("hidden_act", is(serde_json::json!(["relu", null]), "residual blocks end in relu")),
        ("num_layers", is(serde_json::json!([3]), "there are 3 blocks")),
        ("d_model", KeyRule::Same("hidden_size".into())),
        ("drop", KeyRule::Free),
        ("droppath", KeyRule::Free),
    ];
    assert_eq!(found.keys, keys.map(|(name, key)| (name.to_string(), key)).into());
    let tensors: Vec<(&str, &TensorKind)> = found.tensors.iter().map(|t| (&t.pattern[..], &t.is)).collect();
    let expected = [
        ("bag.*.kernel", &TensorKind::Same("bag.*.weight".into())),
        ("bag.extra.*", &TensorKind::Unused),
        ("bag.scale", &TensorKind::Buffer(Buffer::Numbers(vec![-0.5, 0.5]))),
    ];
    assert_eq!(tensors, expected);
    let shallow = compile_with("own.peft", source, &[("model.layers".into(), "1".into())], &no_imports);
    let shallow = shallow.unwrap_or_else(|e| panic!("{e}")).backbone.checkpoint.tensors;
    assert_eq!(shallow[1].is, TensorKind::Buffer(Buffer::Positions));
}

#[test]
fn library_finds_backbones_by_model_type() {
    for backbone in library::backbones() {
        assert_eq!(library::backbone_of(&backbone.name), Some(backbone.name));
    }
    assert_eq!(library::backbone_of("mistral"), None);
}

/// A recipe equals the recipe of its source text, and overrides of a recipe pass the checks of a spec.
#[test]
fn recipe_source_round_trips() {
    for settings in [
        &[][..],
        &[("train.schedule", "polynomial"), ("train.power", "2"), ("train.lr_end", "1e-7"), ("train.warmup", "500")],
        &[("train.schedule", "wsd"), ("train.lr_decay", "0.25"), ("train.precision", "bf16")],
        &[("train.schedule", "constant"), ("train.steps", "7"), ("train.label_smoothing", "0.1")],
        &[("train.optimizer", "sgd"), ("train.momentum", "0.9"), ("train.weight_decay", "0.1"), ("train.clip", "0")],
        &[("train.optimizer", "lion"), ("train.lr", "1e-4")],
        &[("train.save", "10min"), ("train.evaluate", "100"), ("train.patience", "3")],
        &[("train.accumulate", "4"), ("train.save", "20"), ("train.hold_out", "500")],
        &[("train.optimizer", "adam"), ("train.eps", "1e-6")],
        &[("train.schedule", "cosine"), ("train.warmup", "0.06"), ("train.seed", "4"), ("train.betas", "[0.8, 0.95]")],
    ] {
        let recipe = tiny(settings).train;
        assert_eq!(recipe.with(&[]).unwrap_or_else(|e| panic!("{e}")), recipe);
        let json = serde_json::to_string(&recipe).expect("JSON");
        assert_eq!(serde_json::from_str::<peft_grammar::model::Recipe>(&json).expect("it reads back"), recipe);
        let longer = recipe.with(&[("train.epochs".into(), "2.5".into())]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(longer.epochs, 2.5);
    }
    let refused = |key: &str, value: &str| {
        tiny(&[]).train.with(&[(key.into(), value.into())]).expect_err("it is refused").to_string()
    };
    assert!(refused("train.lr", "-1").contains("`lr` is above 0 and at most 10, found -1"));
    assert!(refused("train.schedule", "wds").contains("did you mean `wsd`?"));
    assert!(refused("train.sclip", "1").contains("a recipe has no setting `sclip`"));
}

/// Settings of the spec override the named definition, and `--set` overrides both.
#[test]
fn precedence_of_named_tasks_and_recipes() {
    let spec = |blocks: &str, set: &[(&str, &str)]| {
        let source = format!("model = bert(layers: 1)\ntune {{ head trainable }}\n{blocks}");
        let set: Vec<(String, String)> = set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let file = "task own { kind: classification  labels: [\"a\", \"b\"]  text: \"words\"  max_tokens: 32 }
                    task sst2 { labels: [\"c\", \"d\"] }
                    train own { lr: 0.5  schedule: constant }
                    train { lr: 0.25 }";
        let import = |path: &str| if path == "own.peft" { Ok(file.to_owned()) } else { Err("no such file".into()) };
        compile_with("spec.peft", &source, &set, &import).unwrap_or_else(|e| panic!("{e}"))
    };
    let labels = |model: &Model| match &model.task.kind {
        TaskKind::Classification { labels, columns } => (labels.join(" "), columns.text.clone().unwrap_or_default()),
        _ => panic!("it classifies"),
    };
    let taken = |model: &Model| (labels(model), model.task.max_tokens);
    let of = |labels: &str, text: &str, max_tokens| ((labels.to_owned(), text.to_owned()), max_tokens);
    assert_eq!(taken(&spec("task sst2", &[])), of("negative positive", "sentence", 512));
    assert_eq!(taken(&spec("task sst2", &[("task.max_tokens", "64")])), of("negative positive", "sentence", 64));
    let import = "import tasks.sst2\ntask sst2 { text: \"review\"  max_tokens: 128 }";
    assert_eq!(taken(&spec(import, &[("task.max_tokens", "64")])), of("negative positive", "review", 64));
    // Without an import, a block with braces is a new task, even if the library has one of that name.
    assert_eq!(taken(&spec("task sst2 { labels: [\"x\", \"y\"] }", &[])), of("x y", "", 512));
    // Imported files go before the library.
    assert_eq!(taken(&spec("import \"own.peft\"\ntask sst2", &[])), of("c d", "", 512));
    assert_eq!(taken(&spec("import \"own.peft\"\ntask own { text: \"t\" }", &[])), of("a b", "t", 32));

    let glue = spec("train chen2022_glue { batch: 32 }", &[("train.epochs", "3")]).train;
    assert_eq!((glue.lr, glue.lr_end, glue.batch, glue.epochs), (2e-4, 1e-7, BatchSize::Sequences(32), 3.0));
    let own = spec("import \"own.peft\"\ntrain own", &[]).train;
    assert_eq!((own.lr, own.schedule), (0.5, Schedule::Constant));
    // The `train` block that shows how to use a file's methods does not affect the spec.
    assert_eq!(spec("import \"own.peft\"", &[]).train.lr, 1e-3);
}

#[test]
fn library_signatures_of_tasks_and_recipes() {
    let signatures = |all: Vec<library::LibraryEntry>| -> Vec<String> {
        assert!(all.iter().all(|d| !d.doc.is_empty()), "a definition without a doc comment");
        all.into_iter().map(|d| d.signature).collect()
    };
    let tasks = ["coqa for generation", "mnli for classification", "sst2 for classification", "webnlg for generation"];
    assert_eq!(signatures(library::tasks()), tasks);
    assert_eq!(signatures(library::recipes()), ["chen2022_webnlg", "chen2022_coqa", "chen2022_glue"]);
}

/// The source of a template round-trips: truncations, a token with the type of another token, and the list of earlier
/// items.
#[test]
fn template_source_round_trips() {
    let model = check("spec.peft", "model = gpt2(layers: 1)\ntune { full() }\ntask coqa", &no_imports);
    let task = model.unwrap_or_else(|e| panic!("{e}")).task;
    let TaskKind::Generation { template, each, .. } = &task.kind else { panic!("it generates") };
    assert_eq!(each[..], ["questions", "answers"]);
    let source = include_str!("../../models/tasks/coqa.peft");
    assert!(source.contains(&format!("template: \"{}\"", template_source(template))), "{}", template_source(template));
    assert_eq!(template[0], Piece::As("<bos_qa>".into(), "<document>".into()));
    assert_eq!(template[2], Piece::Cut(Extent::First(400), Box::new(Piece::Field("story".into()))));
    let Piece::Cut(Extent::Last(2), turns) = &template[3] else { panic!("the last two turns") };
    assert!(matches!(&**turns, Piece::Each(name, inside) if name == "before" && inside.len() == 4));
}
