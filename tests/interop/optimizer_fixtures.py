"""Writes optimizers.json: the trained values after 20 steps of each optimizer.

AdamW, Adam and SGD are PyTorch's, in float64, after torch.nn.utils.clip_grad_norm_. Lion is Algorithm 2 of Chen et al.
(2023), implemented here. The first tensor has weight decay; the second has it only if all tensors have. In a case with
`factors`, each tensor is a parameter group whose learning rate is its factor times that of the step. A case with
`average` also has PyTorch's averages of the values. Values and gradients are multiples of 1/256, which float32
represents exactly. Run this in the environment that venv.sh creates.
"""

import json
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SHAPES = {"a": (5, 7), "b": (9,)}
STEPS = 20
RATES = [2e-2 * min(1, (step + 1) / 5) * (1 - step / 25) for step in range(STEPS)]

CASES = [
    {"optimizer": "adamw", "weight_decay": 0.1, "betas": [0.9, 0.98], "eps": 1e-6},
    {"optimizer": "adamw", "clip": 0},
    {"optimizer": "adam", "weight_decay": 0.05},
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.1, "clip": 0},
    {"optimizer": "lion"},
    {"optimizer": "lion", "weight_decay": 0.2, "betas": [0.95, 0.98]},
    {"optimizer": "adamw", "weight_decay": 0.1, "decays": "all"},
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "decays": "all"},
    {"optimizer": "adamw", "average": 0.9},
]

# Cases with learning rates by group.
CASES_OF_GROUPS = [
    ({"optimizer": "adamw", "weight_decay": 0.1}, [0.125, 2.0]),
    ({"optimizer": "adam", "weight_decay": 0.05}, [1.0, 0.125]),
    ({"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1}, [2.0, 0.5]),
    ({"optimizer": "lion", "weight_decay": 0.2}, [0.5, 2.0]),
]


class Lion(torch.optim.Optimizer):
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                c = beta1 * m + (1 - beta1) * p.grad
                p.data = p.data - lr * (c.sign() + decay * p.data)
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


def optimizer(case, groups):
    betas = tuple(case.get("betas", [0.9, 0.99] if case["optimizer"] == "lion" else [0.9, 0.999]))
    eps = case.get("eps", 1e-8)
    match case["optimizer"]:
        case "adamw":
            return torch.optim.AdamW(groups, lr=1, betas=betas, eps=eps)
        case "adam":
            return torch.optim.Adam(groups, lr=1, betas=betas, eps=eps)
        case "sgd":
            return torch.optim.SGD(groups, lr=1, momentum=case.get("momentum", 0))
        case "lion":
            return Lion(groups, {"lr": 1, "betas": betas})


def run(case, values, gradients, factors=(1, 1)):
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    decay = case.get("weight_decay", 0)
    decays = {"a": decay, "b": decay if case.get("decays") == "all" else 0}
    groups = [{"params": [p], "weight_decay": decays[name]} for name, p in parameters.items()]
    steps = optimizer(case, groups)
    model = torch.nn.ParameterDict(parameters)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(case.get("average", 0.5)))
    for rate, gradient in zip(RATES, gradients):
        for name, p in parameters.items():
            p.grad = gradient[name].clone()
        if case.get("clip", 1):
            torch.nn.utils.clip_grad_norm_(parameters.values(), case.get("clip", 1))
        for group, factor in zip(steps.param_groups, factors):
            group["lr"] = factor * rate
        steps.step()
        average.update_parameters(model)
    found = {"values": flat({name: p.detach() for name, p in parameters.items()})}
    if "average" in case:
        found["averages"] = flat({name: average.module[name].detach() for name in parameters})
    return found


def flat(tensors):
    return [x for tensor in tensors.values() for x in tensor.flatten().tolist()]


def drawn(generator, scale):
    numbers = {}
    for name, shape in SHAPES.items():
        numbers[name] = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale * 256).round() / 256
    return numbers


def main():
    generator = torch.Generator().manual_seed(7)
    values = drawn(generator, 1.0)
    # The scales are such that some steps are clipped and some are not.
    gradients = [drawn(generator, 0.5 if step % 3 else 0.1) for step in range(STEPS)]
    for gradient in gradients:
        gradient["a"][2, 3] = 0
    cases = [{"train": case, **run(case, values, gradients)} for case in CASES]
    for case, factors in CASES_OF_GROUPS:
        cases.append({"train": case, "factors": factors, **run(case, values, gradients, factors)})
    lines = ",\n".join(json.dumps(case) for case in cases)
    given = {"rates": RATES, "values": flat(values), "gradients": [flat(gradient) for gradient in gradients]}
    given = "".join(f"{json.dumps(key)}: {json.dumps(numbers)},\n" for key, numbers in given.items())
    (Path(__file__).parent / "optimizers.json").write_text(f'{{{given}"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
