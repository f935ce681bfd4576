"""Records the effect of every key of transformers' configurations on a tiny model.

For each family it writes to config/:

        FAMILY.json         the base configuration, a batch, its logits, and for each key with another value: whether
                        transformers loads it, whether the model is another one, and its logits where it is
    FAMILY.safetensors  the weights, the same for all

A model is different if its logits differ, or if it has other tensors than the file. Logits are computed in float64,
except for what transformers itself computes in float32 (rotary angles, and the softmax of its `eager` attention), so a
difference of more than a millionth is one of the function. Every key is tried with every value of `values`, which knows
the values that a type allows and lists names by hand. Keys of older versions are tried without the keys that replaced
them.

Run this in the environment that venv.sh creates. Its arguments are names of families; without any, all are written.
"""

import dataclasses
import json
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from unittest import mock

import torch
from llama_fixtures import rms_norm
from make import draw_base
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.models.llama import modeling_llama

OUT = Path(__file__).resolve().parent / "config"
VOCAB = 13
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
FAMILIES = {
    "bert": (BertForSequenceClassification, BertConfig(**SIZES, max_position_embeddings=12)),
    "roberta": (
        RobertaForSequenceClassification,
        RobertaConfig(**SIZES, max_position_embeddings=14, type_vocab_size=1, layer_norm_eps=1e-5),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_inner=24, n_positions=12, bos_token_id=0, eos_token_id=0
        ),
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES | {"num_attention_heads": 4}, num_key_value_heads=2, max_position_embeddings=12),
    ),
}
# No token is a padding token, because RoBERTa counts positions from the tokens that are not padding.
IDS = [[3, 5, 7, 4, 11, 2], [9, 6, 12, 8, 10, 5]]

ACTIVATIONS = ["relu", "gelu", "gelu_new", "gelu_python", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "quick_gelu"]
ACTIVATIONS += ["silu", "swish", "tanh"]

# Values by key, if the type does not determine the allowed values, and keys that occur in files although the class has
# none of that name: those of older and newer versions and of other families.
BY_HAND = {
    "model_type": ["xlm-roberta", "camembert"],  # classes that declare themselves as RoBERTa
    "hidden_act": ACTIVATIONS,
    "activation_function": ACTIVATIONS,
    "num_attention_heads": [1, 4, 8],
    "n_head": [1, 4, 8],
    "num_key_value_heads": [1, 4],
    "num_hidden_layers": [1, 3],
    "n_layer": [1, 3],
    "id2label": [{"0": "no", "1": "yes"}, {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}],
    "label2id": [{"no": 0, "yes": 1}],
    "num_labels": [2, 3],
    "problem_type": ["regression", "single_label_classification", "multi_label_classification"],
    "summary_type": ["last", "first", "mean"],
    "summary_activation": ["tanh"],
    "dtype": ["float16", "bfloat16"],
    "torch_dtype": ["float16"],
    "architectures": [["BertModel"], ["LlamaForSequenceClassification"]],
    "transformers_version": ["4.8.2"],
    "_name_or_path": ["somewhere/else"],
    "name_or_path": ["somewhere/else"],
    "eos_token_id": [1, [1, 2], None],
    "pad_token_id": [0, 1, None],  # these ids do not occur in the batch
    "rope_parameters": [
        None,
        {},
        {"rope_theta": 500.0, "rope_type": "default"},
        {"rope_theta": 10000.0},
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [2.0, 3.0], "long_factor": [2.0, 3.0], "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 4,
            "rope_theta": 10000.0,
        },
        {"rope_type": "default", "rope_theta": 10000.0, "factor": 3.0},
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ],
    "rope_scaling": [None, {"type": "linear", "factor": 2.0}, {"rope_type": "default"}, {"rope_type": "dynamic", "factor": 4.0}],
    "rope_theta": [500.0, 10000.0],
    "rope_type": ["linear"],
    "partial_rotary_factor": [0.5],
    "sliding_window": [2],
    "use_sliding_window": [True],
    "layer_types": [["sliding_attention", "full_attention"]],
    "position_embedding_type": ["relative_key", "relative_key_query"],
    "gradient_checkpointing": [True],
    "pruned_heads": [{"0": [0]}],
    "per_layer_config": [{"1": {"hidden_act": "relu"}}, {"1": {"activation_function": "relu"}}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}],
    "tie_encoder_decoder": [True],
    "cross_attention_hidden_size": [8],
    "use_bfloat16": [True],
    "torchscript": [True],
    "tf_legacy_loss": [True],
    "tie_last_hidden_states": [False],
    "attn_implementation": ["eager"],
    "_attn_implementation": ["eager"],
    "_attn_implementation_autoset": [True],
    "task_specific_params": [{"text-generation": {"do_sample": True, "max_length": 50}}],
    "finetuning_task": ["sst2"],
    "tokenizer_class": ["BertTokenizer"],
    "n_ctx": [7],
    "n_special": [3],
    "predict_special_tokens": [False],
    "sep_token_id": [3],
    "cls_token_id": [3],
    "prefix": ["a b"],
    "is_composition": [True],
    "output_past": [True],
    "_commit_hash": ["abc"],
    "initializer_factor": [2.0],
    "qkv_bias": [True],
    "logit_scale": [3.0],
    "text_config": [{"hidden_size": 8}],
    "auto_map": [{"AutoModel": "modeling_mine.Mine"}],
}
# Keys that older versions and other tools write.
BY_HAND |= dict.fromkeys(["language", "license", "unsloth_version"], ["en"])
BY_HAND |= dict.fromkeys(["custom_pipelines", "transformers.js_config"], [{"a": {"b": "c"}}])
BY_HAND |= dict.fromkeys(["unsloth_fixed", "low_memory", "is_assistant", "disable_compile"], [True])
BY_HAND |= dict.fromkeys(["_experts_implementation", "experts_implementation"], ["eager"])
BY_HAND |= dict.fromkeys(["mask_token_id", "unk_token_id", "decoder_start_token_id"], [3])
OLDER = ["num_beam_groups", "diversity_penalty", "penalty_alpha", "dola_layers", "constraints", "force_words_ids"]
OLDER += ["forced_decoder_ids", "generation_kwargs", "prefill_chunk_size", "top_h", "cache_config", "compile_config"]
OLDER += ["assistant_early_exit", "max_matching_ngram_size", "continuous_batching_config"]
BY_HAND |= dict.fromkeys(OLDER, [2])

# Keys of older files, and the keys that replaced them.
BEFORE = {"rope_theta": "rope_parameters", "rope_scaling": "rope_parameters", "rope_type": "rope_parameters"}
BEFORE |= {"partial_rotary_factor": "rope_parameters", "num_attention_heads": "head_dim"}


def keys(config):
    """Every key of the configuration, of its class and its base classes, and of generation."""
    found = dict.fromkeys(config.to_dict())
    found |= dict.fromkeys(field.name for field in dataclasses.fields(type(config)))
    found |= dict.fromkeys(type(config).attribute_map)
    annotations = (item for c in type(config).__mro__ for item in getattr(c, "__annotations__", {}).items())
    found |= dict.fromkeys(key for key, kind in annotations if "ClassVar" not in str(kind))
    found |= dict.fromkeys(key for key in GenerationConfig().to_dict() if key != "transformers_version")
    return list(found)


def values(key, base, config):
    """Other values for a key."""
    if key == "model_type" and base[key] != "roberta":
        others = []
    elif key in BY_HAND:
        others = BY_HAND[key]
    else:
        value = base.get(key, getattr(config, key, None))
        match value:
            case bool():
                others = [not value]
            case int():
                others = [value + 1, value + 2]
            case float():
                others = [value * 2 + 0.25] if value > 1e-3 or value == 0 else [1e-3, value * 2]
            case str():
                others = ["other"]
            case None:
                others = [3, True, "other"]
            case _:
                others = [None]
        others = [*others, None]
    return [other for other in others if key not in base or other != base[key]]


def load(config, weights):
    """The logits, and whether the model has other tensors than the file."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        family, _ = FAMILIES.get(config["model_type"], (AutoModelForSequenceClassification, None))
        model, info = family.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if info["mismatched_keys"] or info["error_msgs"]:
        raise ValueError("shapes that do not fit")
    other = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]]))
    with torch.no_grad():
        out = model.double().eval()(input_ids=torch.tensor(IDS))
    logits = out[0] if isinstance(out, tuple) else out.logits
    return logits.double(), other


def outcome(config, weights, logits):
    try:
        found, other = load(config, weights)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:100]}
    if found.shape == logits.shape and (found - logits).abs().max() <= 1e-6 * logits.abs().max():
        return {"changes": bool(other), **({"tensors": other} if other else {})}
    return {"changes": True, **({"tensors": other} if other else {}), "logits": numbers(found)}


def numbers(logits):
    return [float(f"{x:.7g}") for x in logits.flatten().tolist()]


def plain(value):
    """A value as JSON represents it."""
    return json.loads(json.dumps(value, default=str))


def write(family):
    architecture, config = FAMILIES[family]
    torch.manual_seed(zlib.crc32(family.encode()))
    model = architecture(config)
    draw_base(model)
    tied = {name for name in model.state_dict() if name == "lm_head.weight" and config.tie_word_embeddings}
    weights = {name: x.contiguous() for name, x in model.state_dict().items() if name not in tied}
    base = plain(config.to_dict()) | {"architectures": [architecture.__name__]}
    logits, other = load(base, weights)
    assert not other, other
    entries = []
    own = keys(config)
    for key in dict.fromkeys([*own, *BY_HAND]):
        for value in plain(values(key, base, config)):
            # Random initialisation that a key may cause is the same for all.
            torch.manual_seed(0)
            entries.append({"key": key, "value": value} | outcome(base | {key: value}, weights, logits))
            if (later := BEFORE.get(key)) in base:
                older = {k: v for k, v in base.items() if k != later} | {key: value}
                torch.manual_seed(0)
                entries.append({"key": key, "value": value, "without": later} | outcome(older, weights, logits))
        if key in base and key != "model_type":
            absent = {k: v for k, v in base.items() if k != key}
            entries.append({"key": key, "absent": True} | outcome(absent, weights, logits))
    OUT.mkdir(exist_ok=True)
    save_file(weights, OUT / f"{family}.safetensors", {"format": "pt"})
    (OUT / f"{family}.safetensors").chmod(0o644)
    lines = ",\n".join("    " + json.dumps(entry) for entry in entries)
    head = json.dumps({"base": base, "keys": own, "ids": IDS, "logits": numbers(logits)})[1:-1]
    (OUT / f"{family}.json").write_text(f'{{\n  {head},\n  "entries": [\n{lines}\n  ]\n}}\n')
    changing = sorted({entry["key"] for entry in entries if entry.get("changes")})
    refused = sorted({entry["key"] for entry in entries if "refused" in entry})
    print(f"{family}: {len(entries)} entries, {len(own)} keys of its class\n  change: {changing}\n  refused: {refused}")


def main():
    warnings.simplefilter("ignore")
    for family in sys.argv[1:] or FAMILIES:
        with mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", rms_norm):
            write(family)


if __name__ == "__main__":
    main()
