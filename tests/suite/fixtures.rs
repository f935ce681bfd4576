//! PyTorch's results on tiny models (`tests/fixtures`), and the specs of those models.

use std::path::{Path, PathBuf};

use peft_grammar::model::Model;
use peft_runtime::adapter::{self, Data, TensorFile};
use serde_json::Value;

/// A model with inputs and PyTorch's results.
pub struct Fixture {
    pub name: String,
    pub json: Value,
    pub file: TensorFile,
    pub path: PathBuf,
}

/// Every fixture whose name starts with `prefix`.
pub fn all(prefix: &str) -> Vec<Fixture> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .expect("the fixtures are part of the repository")
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".json").map(str::to_string))
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    assert!(!names.is_empty(), "no fixture starts with `{prefix}`");
    names.into_iter().map(|name| read(&folder, name)).collect()
}

/// The fixture with this name.
pub fn one(name: &str) -> Fixture {
    all(name).into_iter().find(|f| f.name == name).unwrap_or_else(|| panic!("no fixture is called `{name}`"))
}

fn read(folder: &Path, name: String) -> Fixture {
    let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).expect("readable");
    let path = folder.join(format!("{name}.safetensors"));
    let file = adapter::load(&path).expect("sound");
    Fixture { json: serde_json::from_str(&text).expect("JSON"), file, path, name }
}

impl Fixture {
    pub fn floats(&self, name: &str) -> &[f32] {
        match self.file.tensors.get(name).map(|t| &t.data) {
            Some(Data::F32(x)) => x,
            _ => panic!("{} holds no floats `{name}`", self.name),
        }
    }

    /// The spec of the fixture's model and method, as a user would write it.
    pub fn spec(&self) -> String {
        let (backbone, method) = (&self.json["backbone"], &self.json["method"]);
        let config = &backbone["config"];
        let n = |key: &str| config[key].as_u64().unwrap_or_else(|| panic!("{} has no `{key}`", self.name));
        let prefix = method.get("prefix").filter(|m| !m.is_null());
        let length = prefix.map_or(0, |p| p["length"].as_u64().expect("a length"));
        let model = match backbone["type"].as_str() {
            Some("gpt2") => format!(
                "gpt2(layers: {}, hidden: {}, heads: {}, ffn: {}, vocab: {}, context: {}, token_types: {}, \
                 first_position: {length}, head_dropout: 0.0, dropout: 0.0, attention_dropout: 0.0, embedding_dropout: 0.0)",
                n("n_layer"),
                n("n_embd"),
                n("n_head"),
                n("n_inner"),
                n("vocab_size"),
                n("n_positions"),
                self.file.tensors.contains_key("inputs.types") || self.file.tensors.contains_key("inputs.0.types"),
            ),
            Some(name @ ("bert" | "roberta")) => format!(
                "{name}(layers: {}, hidden: {}, heads: {}, ffn: {}, vocab: {}, context: {}, \
                 dropout: 0.0, attention_dropout: 0.0)",
                n("num_hidden_layers"),
                n("hidden_size"),
                n("num_attention_heads"),
                n("intermediate_size"),
                n("vocab_size"),
                n("max_position_embeddings"),
            ),
            Some("llama") => format!(
                "llama(layers: {}, hidden: {}, heads: {}, kv_heads: {}, ffn: {}, vocab: {}, context: {}, eps: {}, \
                 rope_theta: {}, tied: {}, head_dropout: 0.0, attention_dropout: 0.0)",
                n("num_hidden_layers"),
                n("hidden_size"),
                n("num_attention_heads"),
                n("num_key_value_heads"),
                n("intermediate_size"),
                n("vocab_size"),
                n("max_position_embeddings"),
                config["rms_norm_eps"],
                config["rope_theta"],
                config["tie_word_embeddings"],
            ),
            other => panic!("no spec for backbone {other:?}"),
        };
        let mut attention = String::new();
        if let Some(prefix) = prefix {
            let (mid, direct) = (prefix["mid"].as_u64().unwrap_or(1), prefix["reparametrised"] == false);
            attention += &format!("prefix(length: {length}, mid: {mid}, direct: {direct})\n");
        }
        if let Some(inducer) = method.get("inducer").filter(|m| !m.is_null()) {
            attention += &format!(
                "inducer(key: {}, value: {}, extended: {}, gating: {})\n",
                inducer["key"], inducer["value"], inducer["value_extended"], inducer["gating"]
            );
        }
        if let Some(lora) = method.get("lora").filter(|m| !m.is_null()) {
            for target in lora["targets"].as_array().expect("a list") {
                let target = target.as_str().expect("a name");
                attention += &format!(
                    "lora(rank: {}, alpha: {}, bias: {}) on {target}\n",
                    lora["r"], lora["alpha"], lora["bias"]
                );
            }
        }
        if let Some(adapter) = method.get("attention_adapter").filter(|m| !m.is_null()) {
            let norm = adapter.get("norm").and_then(Value::as_bool).unwrap_or(true);
            attention += &format!("adapter(bottleneck: {}, norm: {norm})\n", bottleneck(adapter));
        }
        let mut ffn = String::new();
        for name in ["dora", "vera"] {
            let Some(options) = options_of(method, name) else { continue };
            for target in options["targets"].as_array().expect("a list") {
                let target = target.as_str().expect("a name");
                let (site, target) = target.split_once('.').unwrap_or(("attention", target));
                let alpha = options.get("alpha").map_or(String::new(), |a| format!(", alpha: {a}"));
                let applied = format!("{name}(rank: {}{alpha}) on {target}\n", options["r"]);
                if site == "ffn" { &mut ffn } else { &mut attention }.push_str(&applied);
            }
        }
        if options_of(method, "ia3").is_some() {
            attention += "ia3()\n";
            ffn += "ia3()\n";
        }
        let mut tune = String::new();
        if !ffn.is_empty() {
            tune += &format!("every ffn {{ {ffn} }}\n");
        }
        if !attention.is_empty() {
            tune += &format!("every attention {{ {attention} }}\n");
        }
        if let Some(adapter) = method.get("ffn_adapter").filter(|m| !m.is_null()) {
            let scale = adapter.get("scale").and_then(Value::as_f64).unwrap_or(1.0);
            tune += &format!("every ffn {{ adapter(bottleneck: {}, scale: {scale:?}) }}\n", bottleneck(adapter));
        }
        match method["train"].as_str() {
            Some("all") => tune += "full()\n",
            Some("bias") => tune += "bitfit()\n",
            _ => {}
        }
        if let Some(rows) = method.get("special_rows").and_then(Value::as_array).filter(|r| !r.is_empty()) {
            let first = rows[0].as_u64().expect("a row");
            tune += &format!("rows {first}..{} of \"transformer.wte.weight\"\n", first + rows.len() as u64);
        }
        if self.kind() != "generation" {
            tune += &format!("head {}\n", method["head"].as_str().unwrap_or("trainable"));
        }
        let task = match self.kind() {
            "generation" => {
                "kind: generation\nspecial: [\"<t>\"]\ntemplate: \"<t> {text}\"\ntarget: \"<t>\"".to_string()
            }
            "regression" => "kind: regression".to_string(),
            kind => {
                let heads = ["score.weight", "classifier.weight", "classifier.out_proj.weight"];
                let head = heads.iter().find_map(|name| self.file.tensors.get(&format!("weights.{name}")));
                let classes = head.expect("a head").shape[0];
                let labels: Vec<String> = (0..classes).map(|c| format!("\"{c}\"")).collect();
                format!("kind: {kind}\nlabels: [{}]", labels.join(", "))
            }
        };
        let optimizer = self.json.get("optimizer").filter(|o| !o.is_null()).map_or(String::new(), |o| {
            format!(
                "betas: {}\neps: {}\nweight_decay: {}\nclip: {}\nschedule: linear\nwarmup: {}\nsteps: {}\n",
                o["betas"], o["eps"], o["weight_decay"], o["clip"], o["warmup_steps"], o["total_steps"]
            )
        });
        let lr = self.json["optimizer"]["base_lr"].as_f64().unwrap_or(1e-3);
        let smoothing = self.json["loss"]["label_smoothing"].as_f64().unwrap_or(0.0);
        format!(
            "model = {model}\ntune {{\n{tune}}}\ntask t {{ {task} }}\ntrain {{ lr: {lr:?}\n label_smoothing: {smoothing:?}\n{optimizer} }}\n"
        )
    }

    /// The kind of the fixture's task.
    fn kind(&self) -> &str {
        match self.json["loss"]["kind"].as_str() {
            Some("causal_lm") => "generation",
            Some(kind @ ("regression" | "token_classification")) => kind,
            _ => "classification",
        }
    }

    /// Whether the model gives logits for every token.
    pub fn of_tokens(&self) -> bool {
        matches!(self.kind(), "generation" | "token_classification")
    }

    pub fn model(&self) -> Model {
        let spec = self.spec();
        peft_grammar::check(&format!("{}.peft", self.name), &spec, &peft_grammar::no_imports)
            .unwrap_or_else(|e| panic!("{}\n{spec}", e.render(false)))
    }
}

/// The options of the method `name`, if the fixture applies it.
fn options_of<'a>(method: &'a Value, name: &str) -> Option<&'a Value> {
    method.get(name).filter(|m| !m.is_null())
}

fn bottleneck(adapter: &Value) -> u64 {
    ["bottleneck", "r", "size"].iter().find_map(|k| adapter.get(*k)?.as_u64()).expect("a bottleneck")
}
