"""Writes the Llama fixtures of tests/fixtures with transformers' LlamaForCausalLM.

The format is that of the GPT-2 fixtures: float32 weights, and values computed in float64 and stored as float32. Run
this in the environment that venv.sh creates.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
from fixture import IGNORED, causal_loss, results, write
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

# The sizes are awkward on purpose: grouped key/value heads, and a head size of 6, so that a rotary half has 3 entries.
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LENGTHS = [13, 2, 8]
# The shortest sequence has a single target.
PROMPTS = [5, 1, 3]

CASES = {
    "llama_finetune": {"tied": False, "lora": None, "seed": 1},
    "llama_lora_qv": {"tied": False, "lora": ["q", "v"], "seed": 2},
    "llama_tied_lora": {"tied": True, "lora": ["q", "k", "v"], "seed": 3},
}


def hf_config(tied):
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **SIZES,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def rms_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rotary_tables(self, x, position_ids):
    dim = self.config.hidden_size // self.config.num_attention_heads
    exponents = torch.arange(0, dim, 2, dtype=x.dtype) / dim
    angles = position_ids[..., None].to(x.dtype) * self.config.rope_parameters["rope_theta"] ** -exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@contextlib.contextmanager
def every_step_in_float64():
    """transformers computes norms and rotary tables in float32 whatever the model's type is. This replaces them."""
    with (
        mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", rms_norm),
        mock.patch.object(modeling_llama.LlamaRotaryEmbedding, "forward", rotary_tables),
    ):
        yield


def draw_weights(model, rng):
    weights = {}
    for name, parameter in model.named_parameters():
        norm = parameter.dim() == 1
        values = rng.normal(1.0 if norm else 0.0, 0.1 if norm else 0.2, parameter.shape)
        weights[name] = values.astype(np.float32)
    return weights


def draw_lora(model, lora, rng):
    weights = {}
    for i, layer in enumerate(model.model.layers):
        for target in lora["targets"]:
            out_features, in_features = getattr(layer.self_attn, f"{target}_proj").weight.shape
            shapes = {"a": (lora["r"], in_features), "b": (out_features, lora["r"])}
            for matrix, shape in shapes.items():
                values = rng.normal(0.0, 0.05, shape).astype(np.float32)
                weights[f"layers.{i}.attention.{target}.lora.{matrix}"] = values
    return weights


def draw_inputs(rng):
    n = max(LENGTHS)
    ids = np.zeros((len(LENGTHS), n), np.int64)
    labels = np.full_like(ids, IGNORED)
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS)):
        ids[row, :length] = rng.integers(1, SIZES["vocab_size"], length)
        labels[row, prompt:length] = ids[row, prompt:length]
    return {"inputs.ids": ids, "inputs.labels": labels, "inputs.lengths": np.array(LENGTHS, np.int64)}


def add_lora(model, lora, tensors):
    for i, layer in enumerate(model.model.layers):
        for target in lora["targets"]:
            a, b = (tensors[f"layers.{i}.attention.{target}.lora.{matrix}"] for matrix in "ab")

            def add(_module, inputs, output, a=a, b=b):
                return output + lora["alpha"] / lora["r"] * (inputs[0] @ a.T @ b.T)

            getattr(layer.self_attn, f"{target}_proj").register_forward_hook(add)


def evaluate(config, method, backbone, peft, inputs, dtype):
    model = LlamaForCausalLM(LlamaConfig(**config)).to(dtype).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in backbone.items():
            parameters[name].copy_(torch.from_numpy(values))
    adapters = {name: torch.from_numpy(values).to(dtype).requires_grad_() for name, values in peft.items()}
    if "lora" in method:
        add_lora(model, method["lora"], adapters)
    trainable = adapters if method["train"] == "peft" else parameters

    # Hooks are needed because transformers applies the last norm to its last hidden state.
    hidden = []
    model.model.embed_tokens.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))

    ids, labels, lengths = (torch.from_numpy(inputs[f"inputs.{key}"]) for key in ("ids", "labels", "lengths"))
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
    loss = causal_loss(logits, labels)
    grads = torch.autograd.grad(loss, list(trainable.values()))
    return results(real, logits, hidden, loss, dict(zip(trainable, grads)))


def make(name, case):
    rng = np.random.default_rng(case["seed"])
    config = hf_config(case["tied"])
    model = LlamaForCausalLM(LlamaConfig(**config))
    backbone, peft = draw_weights(model, rng), {}
    method = {"train": "all", "head": "frozen"}
    if case["lora"]:
        lora = {"targets": case["lora"], "r": 3, "alpha": 6, "bias": False}
        method = {"lora": lora, "train": "peft", "head": "frozen"}
        peft = draw_lora(model, lora, rng)
    inputs = draw_inputs(rng)

    with every_step_in_float64():
        exact = evaluate(config, method, backbone, peft, inputs, torch.float64)
    rounded = evaluate(config, method, backbone, peft, inputs, torch.float32)

    head = (
        "the LM head is tied: logits = norm(x) @ embed_tokens.T, no lm_head tensor is stored"
        if case["tied"]
        else "the LM head is lm_head.weight [V,d]; it counts as part of the backbone"
    )
    about = {
        "backbone": {"type": "llama", "config": config},
        "method": method,
        "loss": {"kind": "causal_lm", "label_smoothing": 0.0},
        "batch": {"size": len(LENGTHS), "lengths": LENGTHS, "token_types": False},
    }
    notes = [
        "labels are aligned with ids (HF convention): position i predicts labels[i+1]; "
        "loss is the mean over the labels != -100 of the whole batch",
        "right padding: positions >= lengths[b] are padding (id 0, label -100); "
        "expect.logits and expect.hidden are written as 0 there: do not compare them",
        head,
        "PEFT tensors drawn from N(0, 0.05), not their method's initialisation",
        "all dropouts 0",
        "computed in float64 from float32 values, norms and rotary tables too",
    ]
    write(name, about, notes, backbone, peft, inputs, exact, rounded)


def main():
    torch.set_num_threads(1)
    for name, case in CASES.items():
        make(name, case)


if __name__ == "__main__":
    main()
