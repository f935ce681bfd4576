"""GPT-2 small on WebNLG batches: peftc against transformers + PEFT and against the paper's method in PyTorch.

    webnlg.py --data DIR [--batches N] [--steps N] [--threads N] [--only PART,…] [--peers NAME,…]

Every side takes training steps on the same batches of 16 examples, and its *real* tokens per second are reported:
padding, which the peers compute, does not count. A peer and peftc alternate batch by batch. The tables show medians
over the batches, also of ratios and of shares of the peak speed, and the peak memory of each process. DIR holds
`webnlg/train.json` and `tokenizers/gpt2`. Weights are random, which does not change the timings.
"""

import argparse
import functools
import json
import math
import random
import re
import statistics
import subprocess
from pathlib import Path

import measure
from measure import PeftcSide, compare_with_peers, machine, peaks, say, table

SPEC = "models/paper/webnlg/inducer_lora.peft"
BATCH, TEXT_TOKENS = 16, 50257
SPECIAL = ["<pad>", "<bos_qa>", "<eos_qa>", "<question>", "<answer>", "<document>"]
SPECIAL += [f"<unused_{i}>" for i in range(4)]
SPECIAL += ["<bos_webnlg>", "<eos_webnlg>", "<subject>", "<property>", "<object>", "<target_webnlg>"]
ID = {token: TEXT_TOKENS + i for i, token in enumerate(SPECIAL)}
PEERS = {
    "peft_lora_f32": "PEFT, LoRA, f32",
    "peft_lora_bf16": "PEFT, LoRA, bf16 autocast",
    "peft_lora_f32_compiled": "PEFT, LoRA, f32, `torch.compile`",
    "peft_lora_bf16_compiled": "PEFT, LoRA, bf16 autocast, `torch.compile`",
    "inducer_lora_f32": "PyTorch, inducer + LoRA, f32",
    "inducer_lora_bf16": "PyTorch, inducer + LoRA, bf16 autocast",
}


def examples(path):
    """Every pair (entry, text) that peftc trains on."""
    found = []
    for record in json.loads(path.read_text())["entries"]:
        for entry in record.values():
            for said in entry["lexicalisations"]:
                if said["comment"] == "good":
                    found.append((entry, said))
    return found


def choose(options, size=BATCH):
    random.seed(1)
    chosen = random.sample(examples(options.data / "webnlg/train.json"), size * options.batches)
    return [chosen[i : i + size] for i in range(0, len(chosen), size)]


def of_length(n):
    """An example of n tokens, one per letter. Half of them are targets."""
    words = n - 8
    triple = {"subject": "a", "property": "a", "object": "a" + " a" * (words // 2 - 1)}
    said = {"comment": "good", "lex": "a" + " a" * (words - words // 2 - 1)}
    return {"category": "a", "modifiedtripleset": [triple]}, said


def as_file(batch, path):
    """Writes the batch as a WebNLG file."""
    entries = [{str(i + 1): {**entry, "lexicalisations": [said]}} for i, (entry, said) in enumerate(batch)]
    path.write_text(json.dumps({"entries": entries}))


def side(options, size, *extra, threads=None):
    """The peftc side, on batches of `size`."""
    command = [options.peftc, "train", SPEC, "--weights", "random", "--tokenizer", options.data / "tokenizers/gpt2"]
    command += ["--set", f"train.batch={size}", "--threads", threads or options.threads, *extra]
    return PeftcSide(command, as_file, options.steps)


def train(options, batches, *extra, threads=None):
    return side(options, len(batches[0]), *extra, threads=threads).take_all(batches)


# The parts of the benchmark. Each prints a table.


def useful(options, batch):
    """The operations per real token that a training step on the batch requires."""
    rows = [encode(tokenizer(options), *example) for example in batch]
    lengths = [len(ids) for ids, _, _ in rows]
    targets = sum(label >= 0 for _, _, labels in rows for label in labels)
    count = measure.flops(options.peftc, SPEC)
    return count(sum(lengths), targets, len(batch), sum(n * n for n in lengths)) / sum(lengths)


def speed(options):
    batches = choose(options)
    work = [useful(options, batch) for batch in batches]
    precise = lambda precision: side(options, BATCH, "--set", f"train.precision={precision}")
    rows, limits = [], {}
    for precision in ["f32", "bf16"]:
        say(precision)
        ours, shares = precise(precision), []
        for batch, each in zip(batches, work):
            # Other processes may slow the machine down, so its peak is measured at the time of the steps.
            peak = peaks(options.threads)
            for name, gflops in peak.items():
                limits.setdefault(name, []).append(gflops)
            shares.append(ours.take(batch) * each / 1e9 / peak.get(precision, math.inf))
        share = f"{statistics.median(shares):.0%}" if precision in limits else ""
        rows.append([f"`peftc`, inducer + LoRA, {precision}", *ours.line.figures, "", "", share])
    rows += compare_with_peers(precise, {name: PEERS[name] for name in options.peers}, batches, options.seconds)
    found = ", ".join(f"{name} {statistics.median(each):.0f}" for name, each in limits.items())
    title = f"{statistics.median(work) / 1e6:.0f} MFLOP a token are useful; peak GFLOP/s in registers: {found}"
    table(title, ["", "tokens/s", "peak memory", "`peftc` is faster", "and smaller", "of the CPU's peak"], rows)


def overhead(options):
    line = train(options, choose(options))
    table("What of a step is no kernel", ["", "share of its time"], [["f32", f"{line.overhead:.2%}"]])


def fusions(options):
    batches = choose(options)
    whole = train(options, batches)
    rows = [["all", *whole.figures, ""]]
    for rule in [*rules(options), "all"]:
        say(f"without {rule}")
        line = train(options, batches, f"--no-fuse={rule}")
        rows.append([f"without {rule}", *line.figures, f"{whole.speed / line.speed:.2f}×"])
    table("Fusion rules", ["", "tokens/s", "peak memory", "with it"], rows)


def rules(options):
    """The fusion rules. peftc lists them when it is asked for an unknown one."""
    asked = subprocess.run([options.peftc, "compile", SPEC, "--no-fuse=?"], capture_output=True, text=True).stderr
    return re.search(r"the rules are (.*)", asked)[1].split(", ")


def scaling(options):
    rows = []
    for size in [4, 16, 64]:
        say(f"batches of {size}")
        line = train(options, choose(options, size))
        rows.append([f"batches of {size}, threads: {options.threads}", *line.figures])
    for threads in range(1, options.threads + 1):
        say(f"{threads} threads")
        line = train(options, choose(options), threads=threads)
        rows.append([f"batches of {BATCH}, threads: {threads}", *line.figures])
    table("Scaling", ["", "tokens/s", "peak memory"], rows)


def memory(options):
    total, rows = 2048, []
    for n in [64, 256, 1024]:
        say(f"sequences of {n} tokens")
        line = train(options, [[of_length(n)] * (total // n)], "--set", "task.max_tokens=1024")
        rows.append([f"{total // n} × {n}", *line.figures])
    table(f"{total} tokens a step, in sequences of other lengths", ["", "tokens/s", "peak memory"], rows)


PARTS = {part.__name__: part for part in [speed, overhead, fusions, scaling, memory]}


# The peers.


def encode(tokenizer, entry, said):
    """Ids, types and labels of one example."""
    ids, types = [ID["<bos_webnlg>"]], [ID["<bos_webnlg>"]]

    def segment(token, text):
        part = [ID[token], *tokenizer.encode(text, add_special_tokens=False).ids]
        ids.extend(part)
        types.extend([ID[token]] * len(part))

    for triple in entry["modifiedtripleset"]:
        for field in ["subject", "property", "object"]:
            segment(f"<{field}>", triple[field])
    source = len(ids) + 1
    segment("<target_webnlg>", said["lex"])
    ids.append(ID["<eos_webnlg>"])
    types.append(ID["<target_webnlg>"])
    labels = [-100] * source + ids[source:]
    return ids, types, labels


@functools.cache
def tokenizer_at(path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def tokenizer(options):
    return tokenizer_at(options.data / "tokenizers/gpt2/tokenizer.json")


def padded(tokenizer, batch):
    import torch

    rows = [encode(tokenizer, *example) for example in batch]
    longest = max(len(ids) for ids, _, _ in rows)

    def column(i, fill):
        return torch.tensor([row[i] + [fill] * (longest - len(row[i])) for row in rows])

    lengths = [len(ids) for ids, _, _ in rows]
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    inputs = {
        "input_ids": column(0, ID["<pad>"]),
        "token_type_ids": column(1, ID["<pad>"]),
        "attention_mask": mask,
        "labels": column(2, -100),
    }
    return inputs, sum(lengths)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=TEXT_TOKENS + len(SPECIAL), use_cache=False))


def peft_lora():
    """LoRA of rank 54 by PEFT. Its one matrix on `c_attn` serves q, k and v."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=54, lora_alpha=54, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True
    )
    return get_peft_model(gpt2(), config)


def inducer_lora():
    """Inducer-tuning with LoRA on the queries, as in the paper: a softmax over [a ; QKᵀ]/√p in addition to f's own."""
    import torch
    from torch import nn
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    heads, width, key, value, rank = 12, 64, 5, 12, 24

    class Attention(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.c_attn, self.c_proj = base.c_attn, base.c_proj
            small = lambda *shape: nn.Parameter(torch.fmod(torch.randn(*shape), 2) * 0.01)
            self.key_down, self.key_down_bias = small(heads, width, key), small(heads, 1, key)
            self.key_up, self.key_up_bias = small(heads, key, width), small(heads, 1, width)
            self.value_down, self.value_down_bias = small(heads, width, value), small(heads, 1, value)
            self.value_up, self.value_up_bias = small(heads, value, heads * width), small(heads * width)
            self.lora_a = nn.Parameter(torch.empty(rank, 768).uniform_(-1 / math.sqrt(768), 1 / math.sqrt(768)))
            self.lora_b, self.lora_bias = nn.Parameter(torch.zeros(768, rank)), nn.Parameter(torch.zeros(768))
            self.dropout = nn.Dropout(0.1)

        def forward(self, hidden_states, *_, attention_mask=None, **__):
            b, n, _ = hidden_states.shape
            q, k, v = self.c_attn(hidden_states).split(768, dim=2)
            s = 32 / rank
            q = q + s * (self.dropout(hidden_states) @ self.lora_a.T @ self.lora_b.T + self.lora_bias)
            q, k, v = (x.view(b, n, heads, width).transpose(1, 2) for x in (q, k, v))
            root = math.sqrt(width)
            own = q + torch.tanh(q @ self.key_down + self.key_down_bias) @ self.key_up + self.key_up_bias
            column = (q * own).sum(-1, keepdim=True) / root
            scores = q @ k.transpose(2, 3) / root
            seen = torch.ones(n, n, dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            joint = torch.cat([column, scores], dim=-1).softmax(-1)
            weight = self.dropout(joint[..., :1])
            f = self.dropout(scores.softmax(-1)) @ v
            out = self.c_proj(f.transpose(1, 2).reshape(b, n, -1))
            induced = weight * torch.tanh(q @ self.value_down + self.value_down_bias)
            out = out + (induced @ self.value_up).sum(1) + self.value_up_bias
            return self.dropout(out), None

    model = gpt2()
    model.requires_grad_(False)
    for block in model.transformer.h:
        assert isinstance(block.attn, GPT2Attention)
        block.attn = Attention(block.attn)
        block.attn.c_attn.requires_grad_(False)
        block.attn.c_proj.requires_grad_(False)
    return model


def peer(options, name):
    """Runs a peer in a process of its own."""
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    method, precision, compiled = re.fullmatch(r"(\w+)_(f32|bf16)(_compiled)?", name).groups()
    model = {"peft_lora": peft_lora, "inducer_lora": inducer_lora}[method]()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    forward = torch.compile(model, dynamic=True) if compiled else model

    def step(inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    batches = [padded(tokenizer(options), batch) for batch in choose(options)]
    # `torch.compile` may compile again for the second batch, whose length differs.
    measure.steps(step, batches, warm_up=2 if compiled else 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peftc", default="target/release/peftc")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="on each batch, by peftc; the first does not count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=measure.names(PARTS), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--peers", type=measure.names(PEERS), default=list(PEERS), help=", ".join(PEERS))
    parser.add_argument("--seconds", type=float, default=1200, help="time limit for a peer, including peftc's turns")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return peer(options, options.peer)
    print(machine(options.threads))
    for part in options.only:
        say(part)
        PARTS[part](options)


if __name__ == "__main__":
    main()
