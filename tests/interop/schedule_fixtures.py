"""Writes schedules.json: the learning rate at every step of a run by transformers' schedules.

Run this in the environment that venv.sh creates. Each case holds the settings of a `train` block and the learning
rates.
"""

import json
from pathlib import Path

import torch
import transformers.optimization as schedules

LR = 1.25e-3
STEPS = 37

CASES = [
    ("schedule: constant  warmup: 5", "get_constant_schedule_with_warmup", {"num_warmup_steps": 5}),
    ("schedule: linear  warmup: 5", "get_linear_schedule_with_warmup", {"num_warmup_steps": 5}),
    # A share of 37 steps: 3.7.
    ("schedule: linear  warmup: 0.1", "get_linear_schedule_with_warmup", {"num_warmup_steps": 3}),
    ("schedule: cosine", "get_cosine_schedule_with_warmup", {"num_warmup_steps": 0}),
    ("schedule: cosine  warmup: 7", "get_cosine_schedule_with_warmup", {"num_warmup_steps": 7}),
    (
        "schedule: cosine  warmup: 7  lr_end: 1e-4",
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"num_warmup_steps": 7, "min_lr": 1e-4},
    ),
    # The paper's schedule.
    (
        "schedule: polynomial  power: 1  lr_end: 1e-7  warmup: 5",
        "get_polynomial_decay_schedule_with_warmup",
        {"num_warmup_steps": 5, "power": 1.0, "lr_end": 1e-7},
    ),
    (
        "schedule: linear  lr_end: 1e-7  warmup: 5",
        "get_polynomial_decay_schedule_with_warmup",
        {"num_warmup_steps": 5, "power": 1.0, "lr_end": 1e-7},
    ),
    (
        "schedule: polynomial  power: 2.5  lr_end: 1e-5",
        "get_polynomial_decay_schedule_with_warmup",
        {"num_warmup_steps": 0, "power": 2.5, "lr_end": 1e-5},
    ),
    (
        "schedule: wsd  warmup: 4  lr_decay: 12",
        "get_wsd_schedule",
        {"num_warmup_steps": 4, "num_decay_steps": 12},
    ),
    # 0.25 of 37 steps is 9.25. transformers' warm-up starts at the minimal rate, so this case has none.
    (
        "schedule: wsd  lr_decay: 0.25  lr_end: 1e-4",
        "get_wsd_schedule",
        {"num_warmup_steps": 0, "num_decay_steps": 9, "min_lr_ratio": 1e-4 / LR},
    ),
]


def rates(function, arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    if "constant" not in function:
        arguments = {"num_training_steps": STEPS, **arguments}
    schedule = getattr(schedules, function)(optimizer, **arguments)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def main():
    cases = [{"train": f"lr: {LR}  {train}", "rates": rates(*how)} for train, *how in CASES]
    lines = ",\n".join(json.dumps(case) for case in cases)
    (Path(__file__).parent / "schedules.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
