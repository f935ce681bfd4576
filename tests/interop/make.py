"""Writes the interoperability cases for Hugging Face PEFT.

Each case is a tiny model with random weights and a random adapter for it, both as the libraries save them, and the
logits of both together:

    cases/NAME/base/config.json, model.safetensors
    cases/NAME/adapter/adapter_config.json, adapter_model.safetensors
    cases/NAME/case.safetensors   inputs.ids, inputs.mask, inputs.labels, expect.logits

Run this in the environment that venv.sh creates. Its arguments are names of cases; without any, all are written.
"""

import contextlib
import json
import shutil
import sys
import warnings
import zlib

import torch
from common import CASES, load_model, run
from llama_fixtures import every_step_in_float64
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCAB = 41
LENGTHS = [9, 2, 6]
CLASSES = 3
# A part of every case's seed. Some seeds are unsuitable: a layer norm over nearly equal values amplifies rounding until
# float32 alone exceeds the tolerance.
SEED = 1
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
PREFIX = {"num_virtual_tokens": 3}
# Matches only the last layer of the feed-forward block. attention.output.dense ends in output.dense, too.
ROBERTA_FFN = r".*\.layer\.\d+\.output\.dense"


def roberta():
    # Published checkpoints have this eps, which is not the library's default.
    options = {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    config = RobertaConfig(**SIZES, **options, max_position_embeddings=34, num_labels=CLASSES)
    return RobertaForSequenceClassification(config)


def bert():
    return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=32, num_labels=CLASSES))


def gpt2():
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_inner=32, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def gpt2_classifier():
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32, "n_positions": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, **tokens, num_labels=CLASSES))


def llama_tagger():
    options = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    return LlamaForTokenClassification(LlamaConfig(**options, max_position_embeddings=32, num_labels=CLASSES))


def roberta_number():
    options = {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "problem_type": "regression"}
    config = RobertaConfig(**SIZES, **options, max_position_embeddings=34, num_labels=1)
    return RobertaForSequenceClassification(config)


def llama(tied=False):
    options = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    return LlamaForCausalLM(LlamaConfig(**options, max_position_embeddings=32, tie_word_embeddings=tied))


def classifier(kind, **options):
    return kind(task_type="SEQ_CLS", **options)


def tagger(kind, **options):
    return kind(task_type="TOKEN_CLS", **options)


def language_model(kind, **options):
    return kind(task_type="CAUSAL_LM", **options)


def cases():
    query_value = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    c_attn = {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True, "target_modules": ["c_attn"]}
    wide = {"r": 3, "target_modules": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], "use_rslora": True}
    q_v = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    gpt2_ia3 = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
    llama_ia3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return {
        "roberta_lora_qv": (roberta, classifier(LoraConfig, **query_value)),
        "roberta_dora_qv": (roberta, classifier(LoraConfig, **query_value, use_dora=True)),
        "roberta_ia3": (
            roberta,
            classifier(
                IA3Config,
                target_modules=rf".*\.(key|value)|{ROBERTA_FFN}",
                feedforward_modules=ROBERTA_FFN,
            ),
        ),
        "roberta_prefix": (roberta, classifier(PrefixTuningConfig, **PREFIX)),
        "bert_lora_qv": (bert, classifier(LoraConfig, **query_value)),
        "gpt2_lora": (gpt2, language_model(LoraConfig, **c_attn)),
        "gpt2_lora_wide": (gpt2, language_model(LoraConfig, **c_attn | wide)),
        "gpt2_dora": (
            gpt2,
            language_model(LoraConfig, **c_attn | {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
        ),
        "gpt2_ia3": (gpt2, language_model(IA3Config, **gpt2_ia3, fan_in_fan_out=True)),
        "gpt2_prefix": (gpt2, language_model(PrefixTuningConfig, **PREFIX)),
        "gpt2_prefix_mlp": (
            gpt2,
            language_model(PrefixTuningConfig, **PREFIX, prefix_projection=True, encoder_hidden_size=8),
        ),
        "llama_lora": (llama, language_model(LoraConfig, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
        "llama_ia3": (lambda: llama(tied=True), language_model(IA3Config, **llama_ia3)),
        # Cases with heads.
        "gpt2_classifier": (gpt2_classifier, classifier(LoraConfig, **c_attn)),
        "llama_tagger": (llama_tagger, tagger(LoraConfig, **q_v)),
        "roberta_number": (roberta_number, classifier(LoraConfig, **query_value)),
        # Cases whose adapters hold more than the method's tensors.
        "bert_lora_bias": (bert, classifier(LoraConfig, **query_value, bias="all")),
        "gpt2_lora_bias": (gpt2, language_model(LoraConfig, **c_attn, bias="lora_only")),
        "gpt2_lora_tokens": (gpt2, language_model(LoraConfig, **c_attn, trainable_token_indices=[5, 6, 7, 8])),
        "gpt2_lora_saved": (
            gpt2,
            language_model(
                LoraConfig, **c_attn, modules_to_save=["ln_f"], trainable_token_indices=list(range(VOCAB))
            ),
        ),
        "llama_lora_tied": (
            lambda: llama(tied=True),
            language_model(LoraConfig, **q_v, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        ),
        "llama_lora_saved": (
            llama,
            language_model(LoraConfig, **q_v, modules_to_save=["embed_tokens", "lm_head", "input_layernorm"]),
        ),
        # Initialisations that are subtracted from the base model's matrices.
        "gpt2_residual_pissa": (
            gpt2,
            language_model(LoraConfig, **c_attn | {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": "pissa"}),
        ),
        "gpt2_residual_olora": (
            gpt2,
            language_model(LoraConfig, **c_attn | {"target_modules": ["attn.c_proj"], "init_lora_weights": "olora"}),
        ),
        "llama_residual_olora": (llama, language_model(LoraConfig, **q_v, init_lora_weights="olora", use_rslora=True)),
    }


def draw_base(model):
    """Draws weights that are large enough for a misplaced one to change the logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.1)
        elif parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.2)


def draw_adapter(model):
    """Draws all trainable tensors, because PEFT initialises every method as the identity."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        with torch.no_grad():
            if "ia3_l" in name:
                parameter.normal_(1.0, 0.3)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(torch.empty_like(parameter).normal_(1.0, 0.2))
            elif name.startswith("prompt_encoder"):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 0.2)


def draw_inputs(config, task):
    # RoBERTa computes positions from the padding id, so no real token may have it.
    pad = config.pad_token_id or 0
    ids = torch.full((len(LENGTHS), max(LENGTHS)), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(2, VOCAB, (length,))
        mask[row, :length] = 1
    if task == "SEQ_CLS":
        labels = torch.randint(0, CLASSES, (len(LENGTHS),))
        labels = labels.float() if config.num_labels == 1 else labels
    else:
        labels = torch.randint(0, CLASSES, ids.shape) if task == "TOKEN_CLS" else ids
        labels = labels.masked_fill(mask == 0, -100)
    return {"inputs.ids": ids, "inputs.mask": mask, "inputs.labels": labels}


def save(model, folder, names):
    """`save_pretrained` without the files that hold neither the tensors nor their configuration."""
    model.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name in names:
            path.chmod(0o644)
        else:
            path.unlink()
    # PEFT keeps names in sets and writes them in arbitrary order, so they are sorted.
    path = folder / "adapter_config.json"
    if path.exists():
        config = json.loads(path.read_text())
        config = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
        path.write_text(json.dumps(config, indent=2, sort_keys=True))


def make(name, base, config):
    torch.manual_seed(zlib.crc32(f"{SEED} {name}".encode()))
    folder = CASES / name
    shutil.rmtree(folder, ignore_errors=True)

    model = base()
    draw_base(model)
    save(model, folder / "base", {"config.json", "model.safetensors"})
    case = draw_inputs(model.config, config.task_type)
    adapted = get_peft_model(model, config)
    draw_adapter(adapted)
    save(adapted, folder / "adapter", {"adapter_config.json", "adapter_model.safetensors"})

    # The model is reloaded, because PEFT saves a prefix without its MLP.
    loaded = PeftModel.from_pretrained(load_model(folder / "base")[0], folder / "adapter").double()
    llama_model = model.config.model_type == "llama"
    with every_step_in_float64() if llama_model else contextlib.nullcontext():
        logits = run(loaded, case)
    assert logits.dtype == torch.float64
    case["expect.logits"] = logits.float()
    save_file(case, folder / "case.safetensors")
    (folder / "case.safetensors").chmod(0o644)
    print(f"{name}: logits up to {logits.abs().max():.3f}")


def main():
    warnings.simplefilter("ignore", FutureWarning)
    for name, (base, config) in cases().items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            make(name, base, config)


if __name__ == "__main__":
    main()
