"""Writes the fixtures of DoRA, IA³ and VeRA of tests/fixtures with PEFT's own modules.

Backbone weights and batch are those of the LoRA fixture of the same backbone. The format is float32 weights, and values
computed in float64 and stored as float32. Run this in the environment that venv.sh creates.
"""

import json
import re
import zlib

import numpy as np
import torch
from fixture import FOLDER, causal_loss, results, write
from make import ROBERTA_FFN, classifier, language_model
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

MODELS = {
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
}


def cases():
    """The methods by their names in the fixtures, with PEFT's configurations."""
    query_value = {"target_modules": ["query", "value"]}
    projections = {"target_modules": ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"], "fan_in_fan_out": True}
    roberta_ia3 = {"target_modules": rf".*\.(key|value)|{ROBERTA_FFN}", "feedforward_modules": ROBERTA_FFN}
    gpt2_ia3 = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
    return {
        "roberta_dora_qv": (
            {"dora": {"r": 4, "alpha": 8, "targets": ["q", "v"]}},
            classifier(LoraConfig, r=4, lora_alpha=8, use_dora=True, **query_value),
        ),
        # Not on c_attn, because PEFT's DoRA there has one A for q, k and v.
        "gpt2_dora": (
            {"dora": {"r": 3, "alpha": 6, "targets": ["attention.out", "ffn.up", "ffn.out"]}},
            language_model(LoraConfig, r=3, lora_alpha=6, use_dora=True, **projections),
        ),
        "roberta_ia3": ({"ia3": {}}, classifier(IA3Config, **roberta_ia3)),
        "gpt2_ia3": ({"ia3": {}}, language_model(IA3Config, **gpt2_ia3, fan_in_fan_out=True)),
        "roberta_vera_qv": (
            {"vera": {"r": 5, "targets": ["q", "v"]}},
            classifier(VeraConfig, r=5, d_initial=0.1, **query_value),
        ),
    }


# PEFT's names and ours. c_attn computes three projections. None stands for q, which is not adapted.
PROJECTIONS = {
    "attention.self.query": "attention.q",
    "attention.self.value": "attention.v",
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "ffn.up",
    "mlp.c_proj": "ffn.out",
}
TENSORS = {
    "lora_A.default.weight": "dora.a",
    "lora_B.default.weight": "dora.b",
    "lora_magnitude_vector.default.weight": "dora.magnitude",
    "vera_lambda_d.default": "vera.d",
    "vera_lambda_b.default": "vera.b",
}
SCALES = {
    "attention.self.key": ["attention.ia3.key"],
    "attention.self.value": ["attention.ia3.value"],
    "attn.c_attn": [None, "attention.ia3.key", "attention.ia3.value"],
    "output.dense": ["ffn.ia3.hidden"],
    "mlp.c_proj": ["ffn.ia3.hidden"],
}
IN_LAYER = re.compile(r"base_model\.model\..+?\.(?:layer|h)\.(\d+)\.(.+)\.((?:lora|ia3|vera)_.+)")
IN_HEAD = re.compile(r"base_model\.model\.classifier\.modules_to_save\.default\.(.+)")

# Mean and standard deviation, by the suffix of our name.
SPREAD = {
    "dora.a": (0.0, 0.05),
    "dora.b": (0.0, 0.05),
    "dora.magnitude": (1.0, 0.1),  # relative to the initial value
    "ia3.key": (1.0, 0.2),
    "ia3.value": (1.0, 0.2),
    "ia3.hidden": (1.0, 0.2),
    "vera.d": (0.1, 0.05),
    "vera.b": (0.0, 0.2),
}
SHARED_SPREAD = (0.0, 0.3)
NOTES = {
    "dora": [
        "PEFT tensors a, b drawn from N(0, 0.05); magnitude = the base weight's norm per output times N(1, 0.1)",
        "y = magnitude / norm * (x W + s * (x a.T) b.T) + bias, s = alpha / r, norm = that of W + s * (b a).T per "
        "output, a constant in the gradients, as PEFT has it",
    ],
    "ia3": [
        "PEFT tensors drawn from N(1, 0.2)",
        "key and value scale the projections' outputs, bias included; hidden what the FFN's last projection reads; "
        "where PEFT's vector covers q too, that part is 1 and its gradient left out",
    ],
    "vera": [
        "PEFT tensors: a, b shared by all layers, frozen, drawn from N(0, 0.3); per projection d from N(0.1, 0.05), "
        "b from N(0, 0.2)",
        "y += b * ((d * (x A.T)) B.T), A = vera.32_32.a, B = vera.32_32.b",
    ],
}


def ours(name, tensor):
    """The parts of one of PEFT's tensors under our names."""
    if head := IN_HEAD.fullmatch(name):
        return {f"classifier.{head[1]}": tensor}
    layer, module, kind = IN_LAYER.fullmatch(name).groups()
    places = SCALES[module] if kind.startswith("ia3_") else [f"{PROJECTIONS[module]}.{TENSORS[kind]}"]
    # IA³'s vectors have a second axis of length 1.
    parts = zip(places, tensor.squeeze().chunk(len(places)))
    return {f"layers.{layer}.{place}": part for place, part in parts if place}


def adapt(base, backbone, config, dtype):
    kind = base["backbone"]["type"]
    config_class, model_class = MODELS[kind]
    model = model_class(config_class(**base["backbone"]["config"])).to(dtype)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == backbone.keys()
    with torch.no_grad():
        for name, values in backbone.items():
            parameters[name].copy_(torch.from_numpy(values))
    return get_peft_model(model, config).eval()


def method_tensors(adapted):
    """Views of the tensors that the method adds to the model, under our names."""
    views = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and not IN_HEAD.fullmatch(name):
            views |= ours(name, parameter.detach())
    if hasattr(adapted.base_model, "vera_A"):
        a, b = adapted.base_model.vera_A["default"], adapted.base_model.vera_B["default"]
        views |= {f"vera.{a.shape[1]}_{b.shape[0]}.{matrix}": tensor for matrix, tensor in (("a", a), ("b", b))}
    return dict(sorted(views.items()))


def draw(adapted, rng):
    peft = {}
    for name, start in method_tensors(adapted).items():
        spread = SHARED_SPREAD if name.startswith("vera.") else SPREAD[".".join(name.split(".")[-2:])]
        values = rng.normal(*spread, start.shape)
        if name.endswith("magnitude"):
            values *= start.numpy()
        peft[name] = values.astype(np.float32)
    return peft


def evaluate(adapted, peft, inputs):
    views = method_tensors(adapted)
    for name, values in peft.items():
        views[name].copy_(torch.from_numpy(values))

    # Hooks are needed because transformers applies GPT-2's last norm to its last hidden state.
    hidden = []
    backbone = adapted.base_model.model.base_model
    layers = backbone.h if hasattr(backbone, "h") else backbone.encoder.layer
    layers[0].register_forward_pre_hook(lambda _module, inputs: hidden.append(inputs[0]))
    for layer in layers:
        layer.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))

    batch = {name.removeprefix("inputs."): torch.from_numpy(values) for name, values in inputs.items()}
    ids, labels = batch["ids"], batch["labels"]
    real = batch["mask"] if "mask" in batch else torch.arange(ids.shape[1]) < batch["lengths"][:, None]
    logits = adapted(input_ids=ids, attention_mask=real.long(), token_type_ids=batch.get("types")).logits
    loss = causal_loss(logits, labels) if labels.dim() == 2 else torch.nn.functional.cross_entropy(logits, labels)

    trainable = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    grads = {}
    for name, grad in zip(trainable, torch.autograd.grad(loss, list(trainable.values()))):
        grads |= ours(name, grad)
    assert all(grad.any() for grad in grads.values())
    return results(real, logits, hidden, loss, grads)


def make(name, method, config):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    like = f"{name.split('_')[0]}_lora_qv"
    base = json.loads((FOLDER / f"{like}.json").read_text())
    tensors = load_file(FOLDER / f"{like}.safetensors")
    inputs = {key: values for key, values in tensors.items() if key.startswith("inputs.")}
    weights = {key.removeprefix("weights."): values for key, values in tensors.items() if key.startswith("weights.")}
    backbone = {key: values for key, values in weights.items() if not key.startswith("layers.")}

    adapted = adapt(base, backbone, config, torch.float64)
    peft = draw(adapted, rng)
    exact = evaluate(adapted, peft, inputs)
    rounded = evaluate(adapt(base, backbone, config, torch.float32), peft, inputs)

    about = {
        "backbone": base["backbone"],
        "method": method | {key: base["method"][key] for key in ("train", "head")},
        "loss": base["loss"],
        "batch": base["batch"],
    }
    notes = [note for note in base["notes"] if not note.startswith(("PEFT tensors", "expect.lambda"))]
    notes += [f"backbone weights and batch of {like}", *NOTES[next(iter(method))]]
    write(name, about, notes, backbone, peft, inputs, exact, rounded)


def main():
    for name, (method, config) in cases().items():
        make(name, method, config)


if __name__ == "__main__":
    main()
