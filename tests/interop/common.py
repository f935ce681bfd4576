"""Shared by make.py and check.py: the location of the cases, and running a model on a case."""

import json
import os
from pathlib import Path

# Set before the libraries are imported, because nothing here may access a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

CASES = Path(__file__).resolve().parent / "cases"

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)


def load_model(folder):
    """The model in `folder`, and transformers' report about its tensors."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    heads = {
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
        "ForTokenClassification": transformers.AutoModelForTokenClassification,
    }
    fitting = (auto for end, auto in heads.items() if architecture.endswith(end))
    auto = next(fitting, transformers.AutoModelForCausalLM)
    return auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)


def run(model, case):
    """The logits of a case's batch: [B,classes], or [B,n,V] and [B,n,classes] with zeros at padded positions."""
    mask = case["inputs.mask"]
    with torch.no_grad():
        logits = model.eval()(input_ids=case["inputs.ids"], attention_mask=mask).logits
    return logits if logits.dim() == 2 else logits * mask[..., None]
