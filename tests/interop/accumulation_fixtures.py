"""Writes accumulation.json: ten steps of AdamW on one batch of sixteen sequences.

The model and its LoRA are those of the case llama_lora, trained by PEFT and PyTorch in float64. The sequences are
padded. The loss is the mean over all targets; a sequence has one to twelve of them. Run this in the environment that
venv.sh creates.
"""

import json

import torch
from common import CASES, load_model
from peft import PeftModel

CASE = CASES / "llama_lora"
STEPS = 10
# Sequences with few targets come first, so that batches of consecutive sequences differ in their numbers of targets.
TARGETS = [1, 1, 2, 1, 1, 3, 2, 1, 12, 9, 1, 11, 12, 2, 10, 12]
RECIPE = {"lr": 0.01, "weight_decay": 0.1, "clip": 0.5}


def sequences(vocab):
    generator = torch.Generator().manual_seed(3)
    lengths = [targets + 2 + i % 3 for i, targets in enumerate(TARGETS)]
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def padded(all_ids):
    width = max(map(len, all_ids))
    ids = torch.zeros(len(all_ids), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (sequence, targets) in enumerate(zip(all_ids, TARGETS)):
        length = len(sequence)
        ids[row, :length] = torch.tensor(sequence)
        mask[row, :length] = 1
        labels[row, length - targets : length] = ids[row, length - targets : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main():
    base, _ = load_model(CASE / "base")
    model = PeftModel.from_pretrained(base, CASE / "adapter", is_trainable=True).double().train()
    all_ids = sequences(base.config.vocab_size)
    batch = padded(all_ids)
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = torch.optim.AdamW(trained, lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    losses, norms = [], []
    for _ in range(STEPS):
        loss = model(**batch).loss
        steps.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, RECIPE["clip"]).item())
        steps.step()
        losses.append(loss.item())
    written = {"train": RECIPE, "ids": all_ids, "targets": TARGETS, "losses": losses, "norms": norms}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in written.items())
    (CASES.parent / "accumulation.json").write_text(f"{{{lines}}}\n")


if __name__ == "__main__":
    main()
