"""Shared by the scripts that write tests/fixtures: the results of a model, and the fixture files."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

HEADS = ("classifier.", "score.")
FOLDER = Path(__file__).resolve().parent.parent / "fixtures"
IGNORED = -100


def causal_loss(logits, labels):
    """The causal loss in the precision of its inputs. transformers computes its own in float32."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def results(real, logits, hidden, loss, grads):
    """A fixture's expected values as numpy arrays. `real` is 1 at tokens that are not padding."""
    expect = {"expect.logits": logits * real[..., None] if logits.dim() == 3 else logits}
    expect |= {"expect.loss": loss.reshape(1)}
    expect |= {f"expect.hidden.{i}": x * real[..., None] for i, x in enumerate(hidden)}
    expect |= {f"expect.grad.{name}": grad for name, grad in grads.items()}
    assert all(x.dtype == loss.dtype for x in expect.values())
    return {name: x.detach().numpy() for name, x in expect.items()}


def rounding(exact, rounded):
    """The differences that float32 alone causes."""
    grads = [name for name in exact if name.startswith("expect.grad.")]
    largest = {name: np.abs(exact[name]).max() for name in grads}
    zero = [name for name in grads if largest[name] < 1e-12]
    return {
        "logits_max_abs": float(np.abs(exact["expect.logits"] - rounded["expect.logits"]).max()),
        "loss_abs": float(abs(exact["expect.loss"] - rounded["expect.loss"])[0]),
        "grad_max_abs_over_tensor_max": float(
            max(np.abs(exact[name] - rounded[name]).max() / largest[name] for name in grads if name not in zero)
        ),
        "grad_tensors_exactly_or_nearly_zero": [name.removeprefix("expect.grad.") for name in zero],
    }


def write(name, about, notes, backbone, peft, inputs, exact, rounded):
    """`about` holds backbone, method, loss and batch. `exact` are the results in float64, `rounded` those in
    float32."""
    sizes = {key.removeprefix("expect.grad."): x.size for key, x in exact.items() if key.startswith("expect.grad.")}
    total = sum(sizes.values())
    head = sum(size for key, size in sizes.items() if key.startswith(HEADS))
    description = {
        "name": name,
        **about,
        "trainable": sorted(sizes),
        "trainable_rows": {},
        "counts": {
            "method": total - head,
            "head": head,
            "special_rows": 0,
            "total_trainable": total,
            "backbone_without_head": sum(x.size for key, x in backbone.items() if not key.startswith(HEADS)),
        },
        "expected_loss_float64": float(exact["expect.loss"][0]),
        "float32_torch_vs_float64": rounding(exact, rounded),
        "lambda_range": [],
        "notes": notes,
    }
    tensors = {f"weights.{key}": values for key, values in (backbone | peft).items()}
    tensors |= inputs | {key: values.astype(np.float32) for key, values in exact.items()}
    path = FOLDER / f"{name}.safetensors"
    save_file({key: np.ascontiguousarray(values) for key, values in tensors.items()}, path)
    path.chmod(0o644)  # safetensors makes the file readable by its owner only
    (FOLDER / f"{name}.json").write_text(json.dumps(description, indent=1))
    loss, float32 = description["expected_loss_float64"], description["float32_torch_vs_float64"]
    print(f"{name}: loss {loss:.6f}, float32 is off by {float32}")
