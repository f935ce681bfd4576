"""GPT-2 small on real WebNLG batches: peftc beside transformers + PEFT and the paper's method written out in PyTorch.

    webnlg.py --peftc BINARY --data DIR [--batches N] [--threads N] [--peers NAME,…] [--fusions]

Every side takes training steps on the same batches of 16 examples and is given its tokens a second over *real* tokens:
padding, which the peers compute, does not count. Printed are medians over the batches, and the peak memory of each
process. DIR holds `webnlg/train.json` and `tokenizers/gpt2`. Weights are random: they change no timing.
"""

import argparse
import json
import math
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPEC = "models/paper/nlg/inducer_lora.peft"
BATCH, TEXT_TOKENS = 16, 50257
SPECIAL = ["<pad>", "<bos_qa>", "<eos_qa>", "<question>", "<answer>", "<document>"]
SPECIAL += [f"<unused_{i}>" for i in range(4)]
SPECIAL += ["<bos_webnlg>", "<eos_webnlg>", "<subject>", "<property>", "<object>", "<target_webnlg>"]
ID = {token: TEXT_TOKENS + i for i, token in enumerate(SPECIAL)}
PEERS = ["peft_lora_f32", "peft_lora_bf16", "inducer_lora_f32", "inducer_lora_bf16"]
RULES = ["rows", "triangle", "column", "attention", "head", "columns", "remat"]


def examples(path):
    """Every (entry, text) as peftc trains on it."""
    found = []
    for record in json.loads(path.read_text())["entries"]:
        for entry in record.values():
            for said in entry["lexicalisations"]:
                if said["comment"] == "good":
                    found.append((entry, said))
    return found


def choose(path, count):
    random.seed(1)
    chosen = random.sample(examples(path), BATCH * count)
    return [chosen[i * BATCH : (i + 1) * BATCH] for i in range(count)]


def as_file(batch, path):
    """The batch as a WebNLG file of its own."""
    entries = [{str(i + 1): {**entry, "lexicalisations": [said]}} for i, (entry, said) in enumerate(batch)]
    path.write_text(json.dumps({"entries": entries}))


def median_line(name, speeds, peak):
    return {"name": name, "speed": statistics.median(speeds), "peak": peak, "all": speeds}


def ours(options, batches, extra=()):
    speeds, peak = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for batch in batches:
            data, out = Path(folder) / "batch.json", Path(folder) / "run"
            as_file(batch, data)
            command = [options.peftc, "train", SPEC, "--weights", "random", "--data", data, "--out", out]
            command += ["--tokenizer", options.data / "tokenizers/gpt2", "--set", "train.steps=4"]
            command += ["--threads", str(options.threads), *extra]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode != 0:
                sys.exit(run.stderr)
            steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            # The first step touches memory for the first time.
            speeds.append(statistics.median(s["tokens_per_second"] for s in steps[1:] if "tokens_per_second" in s))
            peak = max(peak, float(re.search(r"peak ([0-9.]+) GB", run.stdout).group(1)))
    return speeds, peak


# The peers' side.


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
    """LoRA-54 by PEFT; its one matrix `c_attn` serves q, k and v."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=54, lora_alpha=54, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True
    )
    return get_peft_model(gpt2(), config)


def inducer_lora():
    """Inducer-tuning with LoRA on the queries, as the paper writes it: a softmax over [a ; QKᵀ]/√p beside f's own."""
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
            seen = torch.ones(n, n, dtype=torch.bool).tril()
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


def peer(options, name, batches):
    import torch
    from tokenizers import Tokenizer

    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    method, _, precision = name.rpartition("_")
    model = {"peft_lora": peft_lora, "inducer_lora": inducer_lora}[method]()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    tokenizer = Tokenizer.from_file(str(options.data / "tokenizers/gpt2/tokenizer.json"))

    def step(inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    prepared = [padded(tokenizer, batch) for batch in batches]
    step(prepared[0][0])
    speeds = []
    for inputs, tokens in prepared:
        begun = time.perf_counter()
        step(inputs)
        speeds.append(tokens / (time.perf_counter() - begun))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"speeds": speeds, "peak": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peftc", default="target/release/peftc")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--fusions", action="store_true", help="the step without each fusion, too")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    batches = choose(options.data / "webnlg/train.json", options.batches)
    if options.peer:
        return peer(options, options.peer, batches)

    speeds, peak = ours(options, batches)
    mine = median_line("peftc inducer + lora f32", speeds, peak)
    print(f"{'':32} real tokens/s   ratio   peak GB")
    print(f"{mine['name']:32} {mine['speed']:13.1f}          {mine['peak']:7.2f}", flush=True)
    for name in filter(None, options.peers.split(",")):
        command = [sys.executable, __file__, "--data", options.data, "--batches", str(options.batches)]
        run = subprocess.run([*command, "--threads", str(options.threads), "--peer", name], capture_output=True, text=True)
        if run.returncode != 0:
            sys.exit(f"{name}:\n{run.stderr}")
        result = json.loads(run.stdout.splitlines()[-1])
        line = median_line(name, result["speeds"], result["peak"])
        ratio = mine["speed"] / line["speed"]
        print(f"{name:32} {line['speed']:13.1f} {ratio:6.2f}× {line['peak']:8.2f}", flush=True)
    if options.fusions:
        for rule in RULES:
            speeds, peak = ours(options, batches, [f"--no-fuse={rule}"])
            line = median_line(f"without {rule}", speeds, peak)
            ratio = mine["speed"] / line["speed"]
            print(f"{line['name']:32} {line['speed']:13.1f} {ratio:6.2f}× {line['peak']:8.2f}", flush=True)


if __name__ == "__main__":
    main()
