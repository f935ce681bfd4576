"""Prints what transformers reads from a merged model's folder.

    merged.py FOLDER TOKEN…
    merged.py --ids TOKENS FOLDER…

Prints JSON: the ids of the tokens, how each is split inside a text, the number of rows of the embedding, the type of
the weights, missing and unexpected tensors, and whether the logits of a text with the tokens are finite. With `--ids`
it prints only the ids of a JSON list of tokens in each folder.
"""

import json
import os
import sys
import warnings

# Set before the libraries are imported, because nothing here may access a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    if sys.argv[1] == "--ids":
        tokens = json.loads(sys.argv[2])
        ids = lambda folder: AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(tokens)
        print(json.dumps([ids(folder) for folder in sys.argv[3:]]))
        return
    folder, tokens = sys.argv[1], sys.argv[2:]
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    ids = tokenizer(" ".join(tokens), return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    found = {
        "ids": tokenizer.convert_tokens_to_ids(tokens),
        "in_text": [tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"] for token in tokens],
        "rows": model.get_input_embeddings().weight.shape[0],
        "vocab_size": model.config.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "complaints": sorted(name for names in info.values() for name in names),
        "finite": bool(torch.isfinite(logits).all()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
