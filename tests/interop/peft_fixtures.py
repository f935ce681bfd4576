"""Records the effect of every key of PEFT's configurations on an adapter's function.

For each case in `cases` that represents a method, and for each key of the method's configuration class, PEFT loads the
adapter with other values of that key in its `adapter_config.json`:

    keys/NAME.json          [{key, value, config, spec, variant, logits, changes, error}]
    keys/NAME.safetensors   VARIANT:TENSOR, where a value needs other tensors than the case's

`config` holds further changes of the configuration. `logits` are PEFT's results with it, and `changes` tells whether
they differ from those with the case's own configuration. `error` is PEFT's refusal. `spec` is the tune block of a spec
that computes the same, if it is not the case's own. Run this in the environment that venv.sh creates.
"""

import dataclasses
import json
import shutil
import tempfile
import warnings
import zlib
from pathlib import Path

import torch
from common import CASES, load_model, run
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig
from safetensors.torch import load_file, save_file

KEYS = CASES.parent / "keys"
CONFIG = "adapter_config.json"
MODEL = "adapter_model.safetensors"
BASE = "base_model.model."

ANY = {
    "task_type": ["FEATURE_EXTRACTION"],
    "auto_mapping": [{"base_model_class": "BertForSequenceClassification", "parent_library": "transformers"}],
    "peft_version": ["0.4.0"],
    "base_model_name_or_path": ["some/model"],
    "revision": ["main"],
    "inference_mode": [False],
}
TARGETS = {
    "target_modules": [["query"], r".*\.(query|value)", r".*\.1\..*\.(query|value)", "all-linear"],
    "exclude_modules": [["layer.1.attention.self.value"], r".*\.layer\.0\..*", ["key"]],
    "fan_in_fan_out": [True],
}
LORA = ANY | TARGETS | {
    "peft_type": ["IA3"],
    "r": [2],
    "lora_alpha": [16, 3],
    "lora_dropout": [0.5],
    "bias": ["lora_only", "all"],
    "use_rslora": [True],
    "modules_to_save": [None, ["classifier"]],
    "init_lora_weights": [
        False, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora", "pissa_niter_4", "corda", "loftq", "lora_ga"
    ],
    "layers_to_transform": [0, [1], [0, 1]],
    "layers_pattern": ["layer", ["encoder"]],
    "rank_pattern": [{"query": 4}, {"query": 2}],
    "alpha_pattern": [
        {"query": 2}, {r"layer\.1\..*\.query": 3, "query": 5}, {"^query": 7}, {"uery": 7}, {r"(?!.*query).*": 9},
    ],
    "megatron_config": [{"tensor_model_parallel_size": 1}],
    "megatron_core": ["other.core"],
    "trainable_token_indices": [None],
    "loftq_config": [{"loftq_bits": 8, "loftq_iter": 1}],
    "eva_config": [{"rho": 3.0}],
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{"direction": "ArBr"}],
    "use_dora": [True],
    "velora_config": [{"num_groups": 4}],
    "alora_invocation_tokens": [[3]],
    "use_qalora": [True],
    "qalora_group_size": [8],
    "monteclora_config": [{"num_samples": 2}],
    "layer_replication": [[[0, 1], [0, 2]]],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "lora_bias": [True],
    "target_parameters": [["encoder.layer.0.attention.self.query.weight"]],
    "use_bdlora": [{"target_modules_bd_a": ["query"], "nblocks": 2}],
    "arrow_config": [{"top_k": 1}],
    "kasa_config": [{"beta": 0.1}],
    "ensure_weight_tying": [True],
}
DORA = LORA | {"use_dora": [False]}
IA3 = ANY | TARGETS | {
    "peft_type": ["LORA"],
    "target_modules": [r".*\.(key|value)|.*\.layer\.\d+\.output\.dense", r".*\.key|.*\.layer\.\d+\.output\.dense"],
    "feedforward_modules": [[], r".*\.layer\.\d+\.output\.dense"],
    "modules_to_save": [None, ["classifier"]],
    "init_ia3_weights": [False],
}
PREFIX = ANY | {
    "peft_type": ["LORA"],
    "num_virtual_tokens": [2],
    "token_dim": [8],
    "num_transformer_submodules": [2],
    "num_attention_heads": [4],
    "num_layers": [1],
    "modules_to_save": [None, ["classifier"]],
    "init_weights": ["zero"],
    "encoder_hidden_size": [8],
    "prefix_projection": [True],
}
METHODS = {
    "bert_lora_qv": (LoraConfig, LORA),
    "roberta_dora_qv": (LoraConfig, DORA),
    "roberta_ia3": (IA3Config, IA3),
    "roberta_prefix": (PrefixTuningConfig, PREFIX),
}
# Other keys that PEFT requires together with a key's value.
BESIDE = {
    "layers_pattern": {"layers_to_transform": [0, 1]},
    "loftq": {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
}


def variants(case, model):
    """Name, tune block, settings and tensors of adapters that hold more than the method's own tensors."""
    adapter = load_file(case / "adapter" / MODEL)
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    base = {name: x for name, x in model.named_parameters()}

    def moved(names):
        return {
            name: base[name] + 0.3 * torch.randn(base[name].shape, generator=generator) for name in names
        }

    def keyed(tensors, layer=""):
        return {BASE + name.replace(".bias", f"{layer}.bias"): x.detach() for name, x in tensors.items()}

    lora = "every attention { lora(rank: 4, alpha: 8) on q, v }"
    if case.name != "bert_lora_qv":
        return
    adapted = [n for n in base if n.endswith(("query.bias", "value.bias"))]
    others = [n for n in base if n.endswith(".bias") and n not in adapted and not n.startswith("classifier")]
    own = keyed(moved(adapted), ".base_layer")
    yield "bias", "lora_only", f'{lora} train "*.query.bias" train "*.value.bias"', {}, adapter | own
    yield "bias", "all", f"{lora} bitfit()", {}, adapter | own | keyed(moved(others))
    table = "bert.embeddings.word_embeddings.weight"
    token = load_file(case / "case.safetensors")["inputs.ids"][0, 1].item()
    listed, swapped = [token, token + 1, token + 2], {"word_embeddings": [token + 1, token]}
    for value, rows in ((listed, f"{token}..{token + 3}"), (swapped, f"{token}..{token + 2}")):
        indices = value if isinstance(value, list) else value["word_embeddings"]
        delta = torch.randn(len(indices), base[table].shape[1], generator=generator)
        tensors = adapter | {BASE + table.replace("weight", "token_adapter.trainable_tokens_delta"): delta}
        yield "trainable_token_indices", value, f'{lora} rows {rows} of "{table}"', {}, tensors
    whole = moved([table])
    names = ["classifier", "word_embeddings"]
    yield "modules_to_save", names, f'{lora} train "{table}"', {}, adapter | keyed(whole)
    module = moved(["bert.pooler.dense.weight", "bert.pooler.dense.bias"])
    names = ["classifier", "pooler.dense"]
    yield "modules_to_save", names, f'{lora} train "bert.pooler.dense.*"', {}, adapter | keyed(module)
    wide = {
        name.replace("lora_B.weight", "lora_B.bias"): torch.randn(x.shape[0], generator=generator)
        for name, x in adapter.items()
        if name.endswith("lora_B.weight")
    }
    yield "lora_bias", True, lora.replace("alpha: 8", "alpha: 8, bias: true"), {}, adapter | wide
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): 1 + torch.rand(x.shape[0], generator=generator)
        for name, x in adapter.items()
        if name.endswith("lora_B.weight")
    }
    yield "use_dora", True, lora.replace("lora(", "dora("), {}, adapter | magnitudes
    smaller = {
        name: (x[:2] if "lora_A" in name else x[:, :2]).contiguous() if "query" in name else x
        for name, x in adapter.items()
    }
    tune = "every attention { lora(rank: 2, alpha: 8) on q } every attention { lora(rank: 4, alpha: 8) on v }"
    yield "rank_pattern", {r"layer\.\d+.*query": 2}, tune, {}, smaller
    yield "r", 2, tune, {"rank_pattern": {"value": 4}}, smaller


def logits(case, config, tensors):
    """PEFT's logits, and its error message if it refuses the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / CONFIG).write_text(json.dumps(config))
        save_file(tensors, folder / MODEL)
        try:
            torch.manual_seed(0)
            model = PeftModel.from_pretrained(load_model(case / "base")[0], folder).double()
            return run(model, load_file(case / "case.safetensors")), None
        except Exception as error:  # every exception counts as a refusal
            return None, f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def entries(name):
    kind, table = METHODS[name]
    fields = {f.name for f in dataclasses.fields(kind)}
    assert fields == table.keys(), f"{name}: {sorted(fields ^ table.keys())} are not accounted for"
    case = CASES / name
    own = json.loads((case / "adapter" / CONFIG).read_text())
    adapter = load_file(case / "adapter" / MODEL)
    model = load_model(case / "base")[0]
    given, _ = logits(case, own, adapter)
    todo = [(key, value, None, {}, None) for key, values in table.items() for value in values]
    todo += list(variants(case, model))
    files = {}
    for key, value, spec, config, tensors in todo:
        beside = BESIDE.get(value if isinstance(value, str) else None) or BESIDE.get(key, {})
        config = beside | config
        found, error = logits(case, own | config | {key: value}, tensors or adapter)
        plain, _ = logits(case, own | config, adapter) if config and tensors is None else (given, None)
        entry = {"key": key, "value": value, "config": config, "spec": spec, "error": error}
        if found is not None:
            entry["logits"] = [round(x, 9) for x in found.flatten().tolist()]
            same = plain is not None and plain.shape == found.shape
            entry["changes"] = not (same and (plain - found).abs().max().item() < 1e-6)
        if tensors is not None:
            variant = f"v{sum(1 for _ in {k.split(':')[0] for k in files})}"
            # Tensors that equal those of the case's adapter are not stored again.
            new = {t: x for t, x in tensors.items() if t not in adapter or not x.equal(adapter[t])}
            files |= {f"{variant}:{tensor}": x.clone().contiguous() for tensor, x in new.items()}
            entry["variant"] = variant
        yield entry, files
        print(f"{name} {key} = {json.dumps(value)}: {error or ('changes' if entry['changes'] else 'free')}")


def main():
    warnings.simplefilter("ignore")
    shutil.rmtree(KEYS, ignore_errors=True)
    KEYS.mkdir()
    for name in METHODS:
        all_entries, files = [], {}
        for entry, files in entries(name):
            all_entries.append(entry)
        lines = ",\n".join(json.dumps(entry) for entry in all_entries)
        (KEYS / f"{name}.json").write_text(f"[\n{lines}\n]\n")
        if files:
            save_file(files, KEYS / f"{name}.safetensors")
            (KEYS / f"{name}.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
