"""Writes tokenizers.json: small tokenizers in every supported layout, and the ids that transformers gives.

    PEFTC_DATA=DIR python tests/interop/tokenizer_fixtures.py

`DIR/data/tokenizers` holds the vocabularies of GPT-2 and RoBERTa, of which only ids are stored (`real`). A case is a
folder: names of files with a key of `contents` or with the content itself. `marked` are the ids with the model's
special tokens, `plain` those without, and `length` is len(tokenizer). `models` is transformers' table from a
`model_type` to a tokenizer class, without classes of packages that are not installed; for models in `overruled` it
takes precedence over a named class.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS, TOKENIZER_MAPPING_NAMES
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, RobertaTokenizer

HERE = Path(__file__).parent
OUT = HERE / "tokenizers.json"

CORPUS = [
    "the film is a good film and the story is not bad", "a bad film with a good story, and the acting was poor",
    "Zoë's café is naïve; the Größe is 42 metres", "tea and coffee, coffee and tea", "the 电影 is 好看", "she didn't like the films",
    "unbelievable storytelling, unforgettable acting", "  indented text\twith tabs\nand lines", "the end of the story",
] * 4

TEXTS = [
    "the film", " the film", "the film ", "  the  film  ", "The Film", "Zoë's naïve café", "GRÖSSE 42", "the 电影 is 好看",
    "好", "tea\tand\tcoffee", "tab\t", "film\nfilm\r\n", "🙂 film 🙂", "didn't she'll we've", "unbelievable", "x", "",
    " ", "   ", "\u00a0film\u00a0", "e\u0301 \u0130stanbul", "film [SEP] story", "[CLS]film", "film <mask> story",
    "film<mask>", "<s>film</s>", "film <|endoftext|> film", "<|endoftext|>", "a <new> b", "a<new>b", "<NEW>", "[PAD] [UNK]",
    "control \u0001 \u0000 \ufffd chars", "soft\u00adhyphen", "ﬁlm ½ Ａ", "don’t “quote”", "word" * 30, "a-b_c/d.e", "१२३",
]


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]"]
    both = CORPUS + [text.lower() for text in CORPUS] + ["zoe naive cafe grosse ﬁlm"] * 4
    tokenizer.train_from_iterator(both, trainers.WordPieceTrainer(vocab_size=230, special_tokens=special, show_progress=False))
    return tokenizer


def byte_level(special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def vocab_json(tokenizer):
    return json.dumps(dict(sorted(tokenizer.get_vocab().items(), key=lambda kv: kv[1])), ensure_ascii=False)


def merges_txt(tokenizer):
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)


def without(tokenizer, **parts):
    """A tokenizer.json with some parts replaced."""
    text = json.loads(tokenizer.to_str())
    text.update(parts)
    return json.dumps(text, ensure_ascii=False)


wp = word_piece()
gpt2 = byte_level(["<|endoftext|>"])
roberta = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
pieces = [token for token, _ in sorted(wp.get_vocab().items(), key=lambda kv: kv[1])]
bert_marks = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
spaced = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
lower = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
CONTENTS = {
    "wp.txt": "".join(token + "\n" for token in pieces),
    "wp.json": without(wp, post_processor=bert_marks),
    "wp_lower.json": without(wp, post_processor=bert_marks, normalizer=lower),
    "gpt2_vocab": vocab_json(gpt2), "gpt2_merges": merges_txt(gpt2),
    "roberta_vocab": vocab_json(roberta), "roberta_merges": merges_txt(roberta),
    "gpt2.json": without(gpt2), "gpt2_spaced.json": without(gpt2, pre_tokenizer=spaced),
    "roberta.json": without(roberta, post_processor={
        "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True, "add_prefix_space": False}),
}
GPT2 = {"vocab.json": "gpt2_vocab", "merges.txt": "gpt2_merges"}
ROBERTA = {"vocab.json": "roberta_vocab", "merges.txt": "roberta_merges"}
WP = {"vocab.txt": "wp.txt"}


def settings(name, **keys):
    return {"tokenizer_config.json": {"tokenizer_class": name, **keys}}


def model(kind):
    return {"config.json": {"model_type": kind}}


def token(content, **keys):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True, **keys}


n = len(pieces)
g, r = gpt2.get_vocab_size(), roberta.get_vocab_size()
CASES = {
    "pieces by model_type": WP | model("bert"),
    "pieces by class": WP | settings("BertTokenizer"),
    "pieces of an older class name": WP | settings("BertTokenizerFast", do_lower_case=True),
    "pieces of DistilBERT": WP | settings("DistilBertTokenizer"),
    "pieces of ELECTRA": WP | settings("ElectraTokenizerFast"),
    "pieces, cased": WP | settings("BertTokenizer", do_lower_case=False),
    "pieces, cased, accents stripped": WP | settings("BertTokenizer", do_lower_case=False, strip_accents=True),
    "pieces, accents kept": WP | settings("BertTokenizer", strip_accents=False),
    "pieces, Chinese in words": WP | settings("BertTokenizer", tokenize_chinese_chars=False),
    "pieces, other marks": WP | settings("BertTokenizer", cls_token="[unused1]", sep_token="[PAD]"),
    "pieces with older files": WP | model("bert") | {
        "special_tokens_map.json": {"additional_special_tokens": ["<new>"], "unk_token": "[UNK]"}, "added_tokens.json": {"<new>": n}},
    "pieces with an added word": WP | model("bert") | {"added_tokens.json": {"storyline": n, "<new>": n + 1}},
    "pieces with a decoder of added tokens": WP | settings("BertTokenizer", added_tokens_decoder={
        "0": token("[PAD]"), str(n): token("<new>", lstrip=True), str(n + 1): token("storyline", special=False, normalized=True)}),
    "pieces, special tokens split": WP | settings("BertTokenizer", split_special_tokens=True),
    "pieces with extra tokens": WP | settings("BertTokenizer", extra_special_tokens=["<new>", "film"]),
    "file of pieces, cased by its settings": {"tokenizer.json": "wp_lower.json"} | settings("BertTokenizer", do_lower_case=False),
    "file of pieces, lower by its class": {"tokenizer.json": "wp.json"} | model("bert"),
    "file of pieces as it stands": {"tokenizer.json": "wp.json"} | settings("PreTrainedTokenizerFast"),
    "file of pieces as it stands, lower": {"tokenizer.json": "wp_lower.json"} | settings("TokenizersBackend", do_lower_case=True),
    "bytes by model_type": GPT2 | model("gpt2"),
    "bytes by class, spaced": GPT2 | settings("GPT2Tokenizer", add_prefix_space=True),
    "bytes with a padding token": GPT2 | settings("GPT2TokenizerFast", pad_token="<new>"),
    "bytes with an added word": GPT2 | model("gpt2") | {"added_tokens.json": {"<new>": g}},
    "marked bytes by model_type": ROBERTA | model("roberta"),
    "marked bytes by class, spaced": ROBERTA | settings("RobertaTokenizer", add_prefix_space=True),
    "marked bytes with a mask that takes blanks": ROBERTA | settings("RobertaTokenizerFast", mask_token=token("<mask>", lstrip=True, __type="AddedToken")),
    "marked bytes with an older mask that takes blanks": ROBERTA | model("roberta") | {
        "special_tokens_map.json": {"mask_token": {k: v for k, v in token("<mask>", lstrip=True).items() if k != "special"}}},
    "marked bytes with other marks": ROBERTA | settings("RobertaTokenizer", cls_token="<mask>", sep_token="<unk>"),
    "file of bytes": {"tokenizer.json": "gpt2.json"} | model("gpt2"),
    "file of bytes, spaced by its settings": {"tokenizer.json": "gpt2.json"} | settings("GPT2Tokenizer", add_prefix_space=True),
    "file of bytes, not spaced by its settings": {"tokenizer.json": "gpt2_spaced.json"} | settings("GPT2Tokenizer", add_prefix_space=False),
    "file of bytes, not spaced by its class": {"tokenizer.json": "gpt2_spaced.json"} | model("gpt2"),
    "file of bytes as it stands, spaced": {"tokenizer.json": "gpt2_spaced.json"} | settings("PreTrainedTokenizerFast"),
    "file of marked bytes": {"tokenizer.json": "roberta.json"} | model("roberta"),
    "file of marked bytes, spaced by its settings": {"tokenizer.json": "roberta.json"} | settings("RobertaTokenizer", add_prefix_space=True),
    "file of marked bytes as it stands": {"tokenizer.json": "roberta.json"} | settings("TokenizersBackend"),
    **{f"file of pieces, lower by {kind}": {"tokenizer.json": "wp.json"} | model(kind)
       for kind in ["layoutlm", "mobilebert", "squeezebert", "lxmert", "visual_bert", "distilbert", "electra"]},
    "file of marked bytes by BART": {"tokenizer.json": "roberta.json"} | model("bart"),
    "file of bytes, not spaced by OPT": {"tokenizer.json": "gpt2_spaced.json"} | model("opt"),
    "file of bytes, spaced by a model without a class": {"tokenizer.json": "gpt2_spaced.json"} | model("llama"),
    "file of bytes, spaced by a model whose file stands for itself":
        {"tokenizer.json": "gpt2_spaced.json"} | model("olmo2") | settings("GPT2Tokenizer"),
    "file of pieces, lower by another name of its class": {"tokenizer.json": "wp.json"} | model("layoutlm") | settings("MobileBertTokenizerFast"),
    "bytes with a model's own tokens": GPT2 | settings(
        "GPT2Tokenizer", extra_special_tokens=["</s>"], image_token="<s>", add_bos_token=False, pad_token="<new>",
        boi_token=token("<mask>", lstrip=True, __type="AddedToken"), eoi_token={"content": "[PAD]"}, audio_token="[UNK]"),
    "file of bytes with a model's own tokens": {"tokenizer.json": "gpt2.json"} | settings(
        "PreTrainedTokenizerFast", image_token="<s>", pad_token="<new>", extra_special_tokens=["</s>"]),
    "bytes with tokens by name": GPT2 | settings("GPT2Tokenizer", model_specific_special_tokens={"x_token": "<new>", "y": "<s>"}),
    "bytes with tokens by name beside a key": GPT2 | settings(
        "GPT2Tokenizer", model_specific_special_tokens={"x_token": "<new>"}, image_token="<s>"),
    "bytes with extra tokens by name": GPT2 | settings(
        "GPT2Tokenizer", extra_special_tokens={"x_token": "<s>", "y_token": token("<mask>", lstrip=True, __type="AddedToken")},
        additional_special_tokens=["<new>"]),
    "bytes with two lists of extra tokens": GPT2 | settings(
        "GPT2Tokenizer", extra_special_tokens=["<s>"], additional_special_tokens=["<new>"]),
    "bytes with an empty list of extra tokens": GPT2 | settings(
        "GPT2Tokenizer", extra_special_tokens=[], additional_special_tokens=["<new>"]),
    "bytes with extra tokens of two files": GPT2 | settings("GPT2Tokenizer", extra_special_tokens=["<s>"]) | {
        "special_tokens_map.json": {"extra_special_tokens": ["<new>", "<s>"], "video_token": "<mask>"}},
}
# Folders that do not name a class, which AutoTokenizer cannot read. They are read by the class of their files.
UNNAMED = {
    "bytes alone": (GPT2, lambda d: GPT2Tokenizer.from_pretrained(d)),
    "marked bytes alone": (ROBERTA, lambda d: RobertaTokenizer.from_pretrained(d)),
    "a file alone": ({"tokenizer.json": "gpt2_spaced.json"}, lambda d: PreTrainedTokenizerFast(tokenizer_file=f"{d}/tokenizer.json")),
}


def ids(files, load):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            text = CONTENTS[content] if isinstance(content, str) else json.dumps(content)
            (Path(folder) / name).write_text(text, newline="")
        tokenizer = load(folder)
    encode = lambda marks: [tokenizer(text, add_special_tokens=marks)["input_ids"] for text in TEXTS]
    return {"length": len(tokenizer), "marked": encode(True), "plain": encode(False)}


def backend(name):
    name = name.removesuffix("Fast")
    return "TokenizersBackend" if name == "MistralCommonBackend" else name


def real(folder, load):
    tokenizer = load(str(Path(os.environ["PEFTC_DATA"]) / "data/tokenizers" / folder))
    encode = lambda marks: [tokenizer(text, add_special_tokens=marks)["input_ids"] for text in TEXTS]
    return {"length": len(tokenizer), "marked": encode(True), "plain": encode(False)}


if __name__ == "__main__":
    cases = {name: {"files": files, **ids(files, AutoTokenizer.from_pretrained)} for name, files in CASES.items()}
    cases |= {name: {"files": files, **ids(files, load)} for name, (files, load) in UNNAMED.items()}
    body = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    contents, texts = json.dumps(CONTENTS, ensure_ascii=False), json.dumps(TEXTS)
    known = lambda kind, name: kind in CONFIG_MAPPING_NAMES or backend(name) == "TokenizersBackend"
    classes = {kind: backend(name) for kind, name in TOKENIZER_MAPPING_NAMES.items() if name and known(kind, name)}
    overruled = sorted(kind for kind in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS if classes[kind] != "TokenizersBackend")
    whole = {"gpt2": real("gpt2", AutoTokenizer.from_pretrained), "roberta": real("roberta", RobertaTokenizer.from_pretrained)}
    OUT.write_text(f'{{"contents": {contents},\n"texts": {texts},\n"models": {json.dumps(classes)},\n"overruled": {json.dumps(overruled)},\n"real": {json.dumps(whole)},\n"cases": {{\n{body}\n}}}}\n')
    print(f"{OUT}: {len(cases)} cases, {OUT.stat().st_size} bytes")
