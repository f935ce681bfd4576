"""Writes pairs.json: pairs of texts as transformers encodes and truncates them, with tokenizers of tokenizers.json.

    python tests/interop/pair_fixtures.py

A case names a case of tokenizers.json and a limit, and holds `ids` and `types` of each pair with `truncation=True` and
that limit. `types` are the tokenizer's own, also for models that use none.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer

HERE = Path(__file__).parent
FIXTURES = json.loads((HERE / "tokenizers.json").read_text())
OUT = HERE / "pairs.json"

LONG = "the film is a good film and the story is not bad "
PAIRS = [
    ("the film", "a good story"), ("film", "film"), (LONG * 2, "a good story"), ("a good story", LONG * 2), (LONG, LONG),
    (LONG * 3, LONG * 2), (" the film ", " Zoë's naïve café "), ("film [SEP] story", "<s>film</s>"), ("the 电影 is 好看", "🙂 film"),
    ("tea\tand\tcoffee", "unbelievable storytelling, unforgettable acting"), ("x", LONG * 4),
]
NAMES = [
    "pieces by model_type", "pieces, cased", "pieces, other marks", "file of pieces, lower by its class", "marked bytes by model_type",
    "marked bytes by class, spaced", "marked bytes with other marks", "file of marked bytes",
]
LIMITS = [512, 31, 30, 16, 9, 6]


def cases():
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            for file, content in FIXTURES["cases"][name]["files"].items():
                text = FIXTURES["contents"][content] if isinstance(content, str) else json.dumps(content)
                (Path(folder) / file).write_text(text, newline="")
            tokenizer = AutoTokenizer.from_pretrained(folder)
        for limit in LIMITS:
            found = [tokenizer(a, b, truncation=True, max_length=limit, return_token_type_ids=True) for a, b in PAIRS]
            yield {"name": name, "limit": limit, "ids": [f["input_ids"] for f in found], "types": [f["token_type_ids"] for f in found]}


OUT.write_text(json.dumps({"pairs": PAIRS, "cases": list(cases())}, ensure_ascii=False, separators=(",", ":")) + "\n")
