"""Writes the GGUF files of tests/interop/gguf, and what the package gguf and transformers read from them.

        types.gguf      a tensor of each supported type; types.safetensors holds the numbers by gguf.quants
        untied.gguf     a llama with mixed types, its own output matrix, and a tokenizer
        tied.gguf       a llama whose output matrix is the token embedding
        pre-NAME.gguf   only a tokenizer, with the pre-tokenizer NAME; pre.json holds the ids of each

untied.safetensors and tied.safetensors hold a padded batch, the logits of transformers' LlamaForCausalLM loaded from
the GGUF file, and two matrices whose rows the file stores in another order. All values are random, with fixed seeds.
Run this in the environment that venv.sh creates.
"""

import json
from pathlib import Path

import common  # noqa: F401  (no model hub)
import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

OUT = Path(__file__).resolve().parent / "gguf"

READ = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]

# The offsets of f16 numbers in a block. Random bits there would sometimes be infinite or NaN.
HALVES = {
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

LINES = [
    "The quick brown fox isn't here, it's 12345 km away.",
    "in 1998  25 and  7 or\t42",
    "  two blanks before, two behind  ",
    "line one\r\nline two\n\n\nline five",
    "WE'RE, we'll; they'd SHOUT!!! (…) --- ===",
    "naïve café, nai\u0308ve cafe\u0301",
    "日本語のテキスト と 한국어",
    "price: $3.50/kg; 10,000.00 €",
    "😀 emoji 👨‍👩‍👧 joined",
    "<|im_start|>user\nhello<|im_end|>",
    "<|im_start> is none, <|endoftext|> is one",
    "٣٤٥ and ½ and x² and Ⅷ",
    "",
    " ",
    "a",
]

CORPUS = LINES + [
    "the cat sat on the mat and the rat ran at the hat",
    "there is another thing that this brings in the morning",
    "he said she had been there when it rained and then it stopped",
]


def quantised(rng, shape, kind):
    """The bytes of a tensor with rows of whole blocks: random numbers, or random bits if gguf can only read the
    type."""
    if kind not in HALVES:
        return gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32) * 0.3, Type[kind])
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    data = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    for at in HALVES[kind]:
        numbers = (rng.standard_normal(data.shape[:2]) * 0.01).astype(np.float16)
        data[:, :, at : at + 2] = numbers[..., None].view(np.uint8)
    return data.reshape(shape[0], -1)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types():
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(OUT / "types.gguf", "none")
    values = {}
    for kind in READ:
        shape = (3, 512) if gguf.GGML_QUANT_SIZES[Type[kind]][0] == 256 else (3, 64)
        data = quantised(rng, shape, kind)
        writer.add_tensor(kind, data, raw_dtype=Type[kind])
        values[kind] = gguf.quants.dequantize(data, Type[kind]).astype(np.float32).reshape(shape)
    finish(writer)
    save_file(values, OUT / "types.safetensors")


def vocabulary():
    """Byte-level BPE with 320 tokens: the tokens in the order of their ids, and the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [tuple(merge) for merge in model["merges"]]


TOKENS, MERGES = vocabulary()


def add_tokenizer(writer, pre):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def plain(normalizer, pre_tokenizer, whole_words=False):
    vocab = {token: id for id, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES, ignore_merges=whole_words))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def references():
    """The pre-tokenizer for each name of `tokenizer.ggml.pre`, by the libraries' own definitions."""
    vocab = {token: id for id, token in enumerate(TOKENS)}
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    # The default pattern of transformers' converter for tiktoken files is Llama 3's.
    pattern = TikTokenConverter().pattern
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bare])

    def of(cls):
        tokenizer = cls(vocab=vocab, merges=MERGES, unk_token=SPECIAL[0], bos_token=None, eos_token=SPECIAL[0], pad_token=None)
        tokenizer = tokenizer.backend_tokenizer
        tokenizer.add_special_tokens(SPECIAL)
        return tokenizer

    return {
        "gpt-2": of(GPT2Tokenizer),
        "smollm": plain(None, digits),
        "llama-bpe": plain(None, split, whole_words=True),
        "qwen2": of(Qwen2Tokenizer),
    }


def pres():
    expected = {"lines": LINES}
    for name, tokenizer in references().items():
        writer = gguf.GGUFWriter(OUT / f"pre-{name}.gguf", "none")
        add_tokenizer(writer, name)
        writer.add_add_bos_token(name == "llama-bpe")
        writer.add_chat_template("{{ messages[0]['content'] }}")
        finish(writer)
        expected[name] = [tokenizer.encode(line, add_special_tokens=False).ids for line in LINES]
    (OUT / "pre.json").write_text(json.dumps(expected, ensure_ascii=False, indent=None) + "\n")


SIZES = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "context": 64}


def pairwise(matrix, heads):
    """The rows of q or k in llama.cpp's order: in each head, row j of the first half is followed by row j of the
    second."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def llama(name, tied, kinds, seed, theta):
    rng = np.random.default_rng(seed)
    hidden, ffn, heads, kv = SIZES["hidden"], SIZES["ffn"], SIZES["heads"], SIZES["kv_heads"]
    width = hidden // heads
    path = OUT / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(SIZES["layers"])
    writer.add_context_length(SIZES["context"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    add_tokenizer(writer, "smollm")
    writer.add_add_bos_token(not tied)
    writer.add_add_eos_token(False)

    def add(tensor, shape, kind, heads=None):
        matrix = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.2)
        if len(shape) == 1:
            matrix += 1
        if heads:
            matrix = pairwise(matrix, heads)
        writer.add_tensor(tensor, gguf.quants.quantize(matrix, Type[kind]), raw_dtype=Type[kind])

    add("token_embd.weight", (len(TOKENS), hidden), kinds["embedding"])
    for layer in range(SIZES["layers"]):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", (hidden,), "F32")
        add(f"{block}.attn_q.weight", (heads * width, hidden), kinds["q"], heads)
        add(f"{block}.attn_k.weight", (kv * width, hidden), kinds["k"], kv)
        add(f"{block}.attn_v.weight", (kv * width, hidden), kinds["v"])
        add(f"{block}.attn_output.weight", (hidden, heads * width), kinds["out"])
        add(f"{block}.ffn_norm.weight", (hidden,), "F32")
        add(f"{block}.ffn_gate.weight", (ffn, hidden), kinds["gate"])
        add(f"{block}.ffn_up.weight", (ffn, hidden), kinds["up"])
        add(f"{block}.ffn_down.weight", (hidden, ffn), kinds["down"])
    add("output_norm.weight", (hidden,), "F32")
    if tied:
        # Scaling factors of rotary positions, as in Llama 3.1's files. Factors of 1 have no effect.
        writer.add_tensor("rope_freqs.weight", np.ones(width // 2, dtype=np.float32))
    else:
        add("output.weight", (len(TOKENS), hidden), kinds["output"])
    finish(writer)

    model = AutoModelForCausalLM.from_pretrained(OUT, gguf_file=path.name, dtype=torch.float32).eval()
    lengths = [11, 7]
    mask = np.array([[i < n for i in range(max(lengths))] for n in lengths], dtype=np.int64)
    ids = rng.integers(0, len(TOKENS), mask.shape) * mask
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    state = model.state_dict()
    wanted = ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"]
    expected = {"inputs.ids": ids, "inputs.mask": mask, "expect.logits": logits * mask[..., None].astype(np.float32)}
    expected.update({f"expect.{tensor}": state[tensor].numpy() for tensor in wanted})
    save_file({key: np.ascontiguousarray(value) for key, value in expected.items()}, OUT / f"{name}.safetensors")


def main():
    OUT.mkdir(exist_ok=True)
    types()
    pres()
    mixed = {"embedding": "Q8_0", "q": "Q4_1", "k": "F16", "v": "Q5_1", "out": "Q4_0", "gate": "Q5_0", "up": "BF16"}
    llama("untied", False, {**mixed, "down": "Q8_0", "output": "Q8_0"}, 2, 10000.0)
    plain = dict.fromkeys(["q", "k", "v", "out", "gate", "up", "down"], "Q8_0")
    llama("tied", True, {**plain, "embedding": "F16"}, 3, 500000.0)


if __name__ == "__main__":
    main()
