"""Writes what the package gguf and transformers read from a GGUF file.

    gguf_check.py FILE.gguf TEXTS.json OUT

OUT/values.safetensors holds every tensor in float32, as decoded by gguf.quants; OUT/case.safetensors holds a padded
batch and its logits; OUT/ids.json holds a thousand texts of WebNLG's TEXTS.json with the ids of transformers'
tokenizer.
"""

import argparse
import json
from pathlib import Path

import common  # noqa: F401  (no model hub)
import gguf
import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

COUNT = 1000


def texts(path):
    """The sentences of a WebNLG file in order."""
    entries = json.loads(path.read_text())["entries"]
    examples = [example for entry in entries for example in entry.values()]
    found = [lexicalisation["lex"] for example in examples for lexicalisation in example["lexicalisations"]]
    return list(dict.fromkeys(found))[:COUNT]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["file", "texts", "out"]:
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    file, out = arguments.file, arguments.out

    values = {}
    for tensor in gguf.GGUFReader(file).tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values[tensor.name] = np.ascontiguousarray(numbers, dtype=np.float32).reshape(tensor.shape[::-1].tolist())
    save_file(values, out / "values.safetensors")
    del values

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    lines = texts(arguments.texts)
    ids = tokenizer(lines).input_ids
    entries = [{"text": line, "ids": row} for line, row in zip(lines, ids, strict=True)]
    (out / "ids.json").write_text(json.dumps(entries))

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    rows = sorted(ids[:40], key=len)[-2:]
    width = max(map(len, rows))
    mask = np.array([[i < len(row) for i in range(width)] for row in rows], dtype=np.int64)
    padded = np.array([row + [0] * (width - len(row)) for row in rows], dtype=np.int64)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask)).logits.numpy()
    logits = logits * mask[..., None].astype(np.float32)
    save_file({"inputs.ids": padded, "inputs.mask": mask, "expect.logits": logits}, out / "case.safetensors")


if __name__ == "__main__":
    main()
