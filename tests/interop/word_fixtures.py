"""Writes words.json: lists of words as transformers encodes and truncates them, with tokenizers of tokenizers.json.

    python tests/interop/word_fixtures.py

A case names a case of tokenizers.json and a limit, and holds `ids` and `tags` of each list with
`is_split_into_words=True`, `truncation=True` and that limit. The tag of word i is i modulo 3. A word's first token has
it, and others have -1.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer

HERE = Path(__file__).parent
FIXTURES = json.loads((HERE / "tokenizers.json").read_text())
OUT = HERE / "words.json"

WORDS = [
    ["the", "film", "is", "unbelievable", "storytelling", ",", "not", "bad", "."], ["film"], ["Zoë", "'s", "naïve", "café"],
    ["U.S.", "films-and-stories", "don't"], ["the", "电影", "🙂", "film"], ["film", "\u200b", "story", "", " film"], ["tea and", "coffee "],
    ["unforgettable"] * 9,
]
# Byte-level tokenizers get a blank before each word, as transformers requires.
NAMES = {
    "pieces by model_type": {}, "pieces, cased": {}, "pieces, other marks": {}, "file of pieces, lower by its class": {},
    "bytes by model_type": {"add_prefix_space": True}, "marked bytes by model_type": {"add_prefix_space": True},
    "marked bytes with other marks": {"add_prefix_space": True},
}
LIMITS = [512, 9, 6]


def tags(found):
    last = None
    for word in found.word_ids():
        yield word % 3 if word is not None and word != last else -1
        last = word


def cases():
    for name, options in NAMES.items():
        with tempfile.TemporaryDirectory() as folder:
            for file, content in FIXTURES["cases"][name]["files"].items():
                text = FIXTURES["contents"][content] if isinstance(content, str) else json.dumps(content)
                (Path(folder) / file).write_text(text, newline="")
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        for limit in LIMITS:
            found = [tokenizer(w, is_split_into_words=True, truncation=True, max_length=limit) for w in WORDS]
            yield {"name": name, "limit": limit, "ids": [f["input_ids"] for f in found], "tags": [list(tags(f)) for f in found]}


OUT.write_text(json.dumps({"words": WORDS, "cases": list(cases())}, ensure_ascii=False, separators=(",", ":")) + "\n")
