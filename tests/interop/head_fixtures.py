"""Writes the fixtures of heads, tests/fixtures/head_*, with transformers' classes for sequences and for tokens.

The format is that of the other fixtures: float32 weights, and values computed in float64 and stored as float32. All
parameters train. Run this in the environment that venv.sh creates.
"""

import contextlib

import numpy as np
import torch
import transformers
from fixture import IGNORED, results, write
from llama_fixtures import every_step_in_float64

# The lengths differ on purpose, so that each sequence's last token has another index.
LENGTHS = [11, 1, 6, 3]
VOCAB = 37
CLASSES = 5
DECODER = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 28,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FAMILIES = {
    "bert": ("Bert", ENCODER | {"max_position_embeddings": 16}),
    "roberta": (
        "Roberta",
        ENCODER | {"max_position_embeddings": 18, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5},
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 20,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": 28,
            "n_positions": 16,
            "resid_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "classifier_dropout": 0.0,
        }
        | DECODER,
    ),
    "llama": (
        "Llama",
        {
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
            "rms_norm_eps": 1e-5,
            "attention_dropout": 0.0,
            "classifier_dropout": 0.0,
        }
        | DECODER,
    ),
}
# The encoders' sequence classification heads are covered by the fixtures of methods.
CASES = [
    ("gpt2", "classification"),
    ("llama", "classification"),
    ("bert", "regression"),
    ("roberta", "regression"),
    ("gpt2", "regression"),
    ("llama", "regression"),
    ("bert", "token_classification"),
    ("roberta", "token_classification"),
    ("gpt2", "token_classification"),
    ("llama", "token_classification"),
]


def build(family, task):
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**options, num_labels=1 if task == "regression" else CLASSES)
    head = "Token" if task == "token_classification" else "Sequence"
    return getattr(transformers, f"{name}For{head}Classification")(config)


def draw_weights(model, rng):
    weights = {}
    for name, parameter in model.named_parameters():
        scale = "norm" in name.lower() or "ln_" in name
        mean = 1.0 if scale and name.endswith("weight") else 0.0
        values = rng.normal(mean, 0.2 if parameter.dim() > 1 else 0.1, parameter.shape)
        weights[name] = values.astype(np.float32)
    return weights


def draw_inputs(family, task, rng):
    count, n = len(LENGTHS), max(LENGTHS)
    ids = np.full((count, n), FAMILIES[family][1].get("pad_token_id", 0), np.int64)
    tags = np.full((count, n), IGNORED, np.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = rng.integers(4, VOCAB, length)
        tags[row, :length] = np.where(rng.random(length) < 0.6, rng.integers(0, CLASSES, length), IGNORED)
    tags[1, 0] = 2
    labels = {
        "classification": rng.integers(0, CLASSES, count),
        "regression": rng.normal(0.0, 2.0, count).astype(np.float32),
        "token_classification": tags,
    }
    return {"inputs.ids": ids, "inputs.labels": labels[task], "inputs.lengths": np.array(LENGTHS, np.int64)}


def evaluate(family, task, weights, inputs, dtype):
    model = build(family, task).to(dtype).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in weights.items():
            parameters[name].copy_(torch.from_numpy(values))
    ids, labels, lengths = (torch.from_numpy(inputs[f"inputs.{key}"]) for key in ("ids", "labels", "lengths"))
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    labels = labels.to(dtype) if task == "regression" else labels
    found = model(input_ids=ids, attention_mask=real.long(), labels=labels)
    logits = found.logits
    if task == "regression":
        loss = torch.nn.functional.mse_loss(logits.squeeze(-1), labels)
    else:
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
    # transformers may compute the loss in float32 whatever the model's type is.
    assert abs(found.loss.item() - loss.item()) < 1e-5 * abs(loss.item()), (found.loss, loss)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    assert all(grad is not None for grad in grads)
    return results(real, logits, [], loss, dict(zip(parameters, grads)))


def make(family, task, seed):
    rng = np.random.default_rng(seed)
    model = build(family, task)
    weights, inputs = draw_weights(model, rng), draw_inputs(family, task, rng)
    with every_step_in_float64() if family == "llama" else contextlib.nullcontext():
        exact = evaluate(family, task, weights, inputs, torch.float64)
    rounded = evaluate(family, task, weights, inputs, torch.float32)
    config = model.config.to_diff_dict()
    if family == "llama":
        config |= {"rope_theta": 10000.0, "tie_word_embeddings": False}
    about = {
        "backbone": {"type": family, "config": config},
        "method": {"train": "all", "head": "trainable"},
        "loss": {"kind": task, "label_smoothing": 0.0},
        "batch": {"size": len(LENGTHS), "lengths": LENGTHS, "token_types": False},
    }
    notes = [
        f"{type(model).__name__}; labels of tokens stand at their own tokens, {IGNORED} where nothing is asked",
        "all dropouts 0; computed in float64 from float32 values",
    ]
    write(f"head_{family}_{task}", about, notes, weights, {}, inputs, exact, rounded)


def main():
    torch.set_num_threads(1)
    for seed, (family, task) in enumerate(CASES):
        make(family, task, seed)


if __name__ == "__main__":
    main()
