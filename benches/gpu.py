"""GPT-2 small on a GPU: peftc against PyTorch. Compilation happens on another machine.

    gpu.py make --small PROGRAM --data DIR [--peftc PROGRAM] [--out DIR]
    gpu.py run [--only PART,…] [--peers NAME,…] [--seconds N]

`make` creates a folder with the runner that needs no LLVM, artifacts for every chip, batches, and reference results for
the parity check; DIR holds `webnlg/train.json` and `tokenizers/gpt2`. `run` is started in that folder on a machine with
NVIDIA's driver and Python, which needs neither Rust nor the CUDA toolkit; the peers need torch, transformers and peft
there. First the gradients and the training losses of a tiny GPT-2 and a tiny BERT are compared with the CPU's results
in the folder. Then every side takes training steps on the same WebNLG examples, 16 at a time, and its *real* tokens per
second (without padding) are reported. Weights are random, which does not change the timings.

Exit codes: 1 if a result differs from the CPU's, 3 if there is no GPU.
"""

import argparse
import array
import json
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import measure
import webnlg
from measure import Line, Refused, say, table

HERE = Path(__file__).resolve().parent
CHIPS = ["sm_90", "sm_80", "sm_70"]
PRECISIONS = {"f32": "f32", "bf16": "half"}
METHODS = {"inducer_lora": "inducer + LoRA", "lora": "LoRA"}
BATCHES, EPOCHS, WARM_UP = 5, 12, 2

# Bounds for the differences to the CPU's f32 results: gradients relative to the largest value, losses relative to the
# loss.
BOUNDS = {"f32": (1e-4, 1e-3), "bf16": (6e-2, 3e-2)}
TINY = ["gpt2", "bert"]
TUNE = "every attention { inducer(key: 2, value: 4) lora(rank: 4, alpha: 8, dropout: 0.1) on q, v }"

PEERS = {
    f"{method}_{precision}{compiled}": f"{title}, {precision}{', `torch.compile`' if compiled else ''}"
    for compiled in ["", "_compiled"]
    for precision in ["f32", "half"]
    for method, title in {"inducer_lora": "PyTorch, inducer + LoRA", "peft_lora": "PEFT, LoRA"}.items()
}


# Part 1: the machine with the compiler.


def make(options):
    out = options.out
    shutil.rmtree(out, ignore_errors=True)
    (out / "parity").mkdir(parents=True)
    shutil.copy(options.small, out / "peftc")
    for script in ["gpu.py", "measure.py", "webnlg.py"]:
        shutil.copy(HERE / script, out)
    (out / "tokenizers/gpt2").mkdir(parents=True)
    shutil.copy(options.data / "tokenizers/gpt2/tokenizer.json", out / "tokenizers/gpt2")
    options.batches = BATCHES
    batches = webnlg.choose(options)
    webnlg.as_file([example for batch in batches for example in batch], out / "batches.json")
    rows = [webnlg.encode(webnlg.tokenizer(options), *example) for batch in batches for example in batch]
    mean = round(statistics.mean(len(ids) for ids, _, _ in rows))
    limits = {}
    for method in METHODS:
        spec = f"models/paper/webnlg/{method}.peft"
        for chip in CHIPS:
            for precision in PRECISIONS:
                name = f"{method}.{chip}.{precision}"
                if kernels_of(chip, precision) == chip:
                    compiled(options, spec, chip, precision, out / f"{name}.peftc")
                target = ["--target", f"cuda:{chip}", "--set", f"train.precision={precision}"]
                asked = [options.peftc, "inspect", spec, "--json", *target, "--set", f"task.max_tokens={mean}"]
                limits[name] = roofline(json.loads(measure.output(asked)))
    (out / "roofline.json").write_text(json.dumps(limits))
    tiny(options, out / "parity")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"{out}: {size / 1e6:.0f} MB; there, `python3 gpu.py run`")
    if size > 65e6:
        sys.exit(f"{out} is over 65 MB: too much to carry")


def kernels_of(chip, precision):
    """The chip whose artifact is used. In f32 all chips have the same kernels."""
    return CHIPS[-1] if precision == "f32" else chip


def compiled(options, spec, chip, precision, out):
    say(out.name)
    target = ["--target", f"cuda:{chip}", "--set", f"train.precision={precision}"]
    measure.output([options.peftc, "compile", spec, *target, "-o", out])


def roofline(costs):
    """The roofline's bound on tokens per second, and the GPU that it is for."""
    batch, limit = costs["batch"], costs["roofline"]
    seconds = max(limit["memory_seconds"], limit["product_seconds"])
    return {"tokens": batch["sequences"] * batch["tokens_each"] / seconds, "card": limit["card"]}


def tiny(options, out):
    """Small models of two kinds, and the CPU's results for them."""
    gpt2, bert = (Path(f"models/demo/{name}.peft").read_text() for name in ["triples", "sentiment"])
    (out / "gpt2.peft").write_text(gpt2.replace("full()", TUNE).replace("batch: 8", "batch: 2"))
    sizes = {"layers: 6": "layers: 2", "hidden: 384": "hidden: 64", "heads: 12": "heads: 4", "ffn: 1536": "ffn: 128"}
    for size, smaller in {**sizes, "vocab: 30522": "vocab: 500"}.items():
        assert size in bert, size
        bert = bert.replace(size, smaller)
    (out / "bert.peft").write_text(bert)
    for file in ["train.json", "tokenizer.json"]:
        shutil.copy(Path("data/triples") / file, out)
    ids = [[7 + 31 * i * (s + 3) % 450 for i in range(12)] for s in range(3)]
    lengths = [12, 5, 9]
    labels = [[-100] * 3 + row[3:] for row in ids]
    write_ints(out / "gpt2.inputs", {"inputs.ids": ids, "inputs.lengths": lengths, "inputs.labels": labels})
    write_ints(out / "bert.inputs", {"inputs.ids": ids, "inputs.lengths": lengths, "inputs.labels": [1, 0, 1]})
    for name in TINY:
        spec = out / f"{name}.peft"
        measure.output([options.peftc, "run", spec, *gradients(out, name), "-o", out / f"{name}.expected"])
        for chip in CHIPS:
            for precision in PRECISIONS:
                if kernels_of(chip, precision) == chip:
                    compiled(options, spec, chip, precision, out / f"{name}.{chip}.{precision}.peftc")
    losses = trained([options.peftc], out / "gpt2.peft", out, options.steps)
    (out / "losses.json").write_text(json.dumps(losses))


def gradients(parity, name):
    return ["--entry", "grad", "--inputs", parity / f"{name}.inputs", "--weights", "random", "--seed", "3"]


def trained(peftc, source, parity, steps, seconds=None):
    """The losses of a short training run."""
    with tempfile.TemporaryDirectory() as out:
        data = ["--data", parity / "train.json", "--tokenizer", parity, "--weights", "random", "--out", out]
        measure.output([*peftc, "train", source, *data, "--set", f"train.steps={steps}"], seconds)
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


# Tensors in safetensors files: a JSON header, followed by the numbers.


def write_ints(path, tensors):
    header, data = {}, b""
    for name, rows in tensors.items():
        flat = [x for row in rows for x in row] if isinstance(rows[0], list) else rows
        shape = [len(rows), len(rows[0])] if isinstance(rows[0], list) else [len(rows)]
        content = struct.pack(f"<{len(flat)}q", *flat)
        header[name] = {"dtype": "I64", "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def floats(path):
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        found[name] = array.array("f", content[8 + length + begin : 8 + length + end])
    return found


def gap(found, expected):
    """The largest difference relative to its tensor's largest value, and the name of that tensor."""
    if found.keys() != expected.keys():
        return float("inf"), "the names"
    worst = (0.0, "")
    for name, want in expected.items():
        # The denominator is at least 1e-6, because a tensor of rounding errors only is no scale to compare with.
        largest = max(1e-6, *map(abs, want))
        apart = max((abs(x - y) for x, y in zip(found[name], want, strict=True)), default=0.0)
        # `max` ignores NaN.
        known = all(x == x for x in found[name])
        worst = max(worst, (apart / largest if known else float("inf"), name))
    return worst


# Part 2: the machine with the GPU.


class TimeLeft:
    """The number of seconds until the time limit."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    def __call__(self):
        left = self.end - time.monotonic()
        if left < 1:
            raise Refused("no time is left; see --seconds")
        return left


def chip(parity):
    """The latest chip whose artifacts run on this GPU."""
    why = ""
    for name in CHIPS:
        with tempfile.TemporaryDirectory() as folder:
            command = [HERE / "peftc", "run", parity / f"gpt2.{name}.bf16.peftc", *gradients(parity, "gpt2")]
            run = subprocess.run([*command, "-o", Path(folder) / "out"], capture_output=True, text=True)
        if run.returncode == 0:
            return name
        why = run.stderr.strip()
        # An older GPU may run artifacts for an earlier chip.
        if "here is" not in why:
            break
    say(f"bench-gpu: nothing runs on a GPU here\n{why}")
    sys.exit(3)


def parity(options):
    folder, rows, right = HERE / "parity", [], True
    for precision in PRECISIONS:
        near, near_loss = BOUNDS[precision]
        cases = [(f"{name}: gradients", name, near) for name in TINY] + [("gpt2: losses of a training", None, near_loss)]
        for title, name, near in cases:
            title = f"{title}, {precision}"
            say(title)
            try:
                if name:
                    source = folder / f"{name}.{kernels_of(options.chip, precision)}.{precision}.peftc"
                    with tempfile.TemporaryDirectory() as out:
                        command = [HERE / "peftc", "run", source, *gradients(folder, name), "-o", Path(out) / "found"]
                        measure.output(command, options.left())
                        apart, where = gap(floats(Path(out) / "found"), floats(folder / f"{name}.expected"))
                else:
                    source = folder / f"gpt2.{kernels_of(options.chip, precision)}.{precision}.peftc"
                    expected = json.loads((folder / "losses.json").read_text())
                    losses = trained([HERE / "peftc"], source, folder, len(expected), options.left())
                    apart, where = gap({"loss": losses}, {"loss": expected})
                verdict = "near enough" if apart <= near else f"TOO FAR: `{where}`"
            except Refused as failure:
                apart, verdict = float("inf"), f"does not run: {failure}"[:300]
            right &= verdict == "near enough"
            rows.append([title, f"{apart:.1e}", f"{near:.0e}", verdict])
    table("Beside the processor, in f32: the largest difference, of the largest number", ["", "is", "may be", ""], rows)
    return right


def ours(options, method, precision):
    artifact = HERE / f"{method}.{kernels_of(options.chip, precision)}.{precision}.peftc"
    data = ["--data", HERE / "batches.json", "--tokenizer", HERE / "tokenizers/gpt2", "--weights", "random"]
    with tempfile.TemporaryDirectory() as out:
        epochs = ["--set", f"train.epochs={EPOCHS}", "--set", f"train.batch={webnlg.BATCH}"]
        printed = measure.output([HERE / "peftc", "train", artifact, *data, "--out", out, *epochs], options.left())
        steps = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    speeds = [step["tokens_per_second"] for step in steps[WARM_UP * BATCHES :]]
    return Line(speeds, measure.peak(printed))


def speed(options):
    limits = json.loads((HERE / "roofline.json").read_text())
    lines, rows = {}, []

    def row(title, line, mine, method, precision):
        limit = limits[f"{method}.{options.chip}.{precision}"]
        ratio = f"{mine.speed / line.speed:.1f}×" if mine and mine is not line else ""
        rows.append([title, *line.figures, ratio, f"{line.speed / limit['tokens']:.0%} of {limit['card']}"])

    for method, title in METHODS.items():
        for precision, called in PRECISIONS.items():
            title_ = f"`peftc`, {title}, {called}"
            say(title_)
            try:
                lines[method, precision] = line = ours(options, method, precision)
                row(title_, line, line, method, precision)
            except Refused as why:
                rows.append([title_, f"does not run: {why}"[:300], "", "", ""])
    for name in options.peers:
        say(PEERS[name])
        method = "lora" if name.startswith("peft_") else "inducer_lora"
        precision = "bf16" if "_half" in name else "f32"
        try:
            command = [sys.executable, HERE / "gpu.py", "run", "--chip", options.chip, "--peer", name]
            line = Line(**json.loads(measure.output(command, options.left()).splitlines()[-1]))
            row(PEERS[name], line, lines.get((method, precision)), method, precision)
        except Refused as why:
            rows.append([PEERS[name], f"does not run: {why}"[:300], "", "", ""])
    head = ["", "tokens/s", "peak memory", "`peftc` is faster", "of the roofline"]
    half = "f16" if options.chip == "sm_70" else "bf16"
    table(f"GPT-2 small on WebNLG, {webnlg.BATCH} examples a step; half is {half}, and f32 is f32 throughout", head, rows)
    return True


def peer(name):
    """Runs a peer in a process of its own and prints the fields of its `Line`."""
    import torch

    compiled, half = name.endswith("_compiled"), "_half" in name
    model = {"inducer": webnlg.inducer_lora, "peft": webnlg.peft_lora}[name.split("_")[0]]().cuda()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    forward = torch.compile(model, dynamic=True) if compiled else model
    kind = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    scaler = torch.cuda.amp.GradScaler(enabled=half and kind == torch.float16)

    def step(inputs):
        with torch.autocast("cuda", dtype=kind, enabled=half):
            loss = forward(**inputs).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        # peftc reads the loss at every step, too.
        loss.item()

    tokenizer = webnlg.tokenizer_at(HERE / "tokenizers/gpt2/tokenizer.json")
    examples = webnlg.examples(HERE / "batches.json")
    batches = []
    for begin in range(0, len(examples), webnlg.BATCH):
        inputs, tokens = webnlg.padded(tokenizer, examples[begin : begin + webnlg.BATCH])
        batches.append(({key: x.cuda() for key, x in inputs.items()}, tokens))
    speeds = []
    for epoch in range(EPOCHS):
        for inputs, tokens in batches:
            begun = time.perf_counter()
            step(inputs)
            if epoch >= WARM_UP:
                speeds.append(tokens / (time.perf_counter() - begun))
    print(json.dumps({"speeds": speeds, "peak": torch.cuda.max_memory_allocated() / 1e9}))


PARTS = {"parity": parity, "speed": speed}


def run(options):
    options.chip = options.chip or chip(HERE / "parity")
    options.left = TimeLeft(options.seconds)
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    print(f"{date.today()}, {gpu()}, artifacts for {options.chip}, `{command}`", flush=True)
    right = [PARTS[part](options) for part in options.only]
    sys.exit(0 if all(right) else 1)


def gpu():
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        name, driver = measure.output(asked).strip().rsplit(", ", 1)
        return f"{name}, driver {driver}"
    except (Refused, FileNotFoundError, ValueError):
        return "a GPU that `nvidia-smi` does not show"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("--peftc", default="target/release/peftc")
    making.add_argument("--small", default="target/small/release/peftc", help="the runner, which is carried")
    making.add_argument("--data", type=Path, required=True)
    making.add_argument("--out", type=Path, default=Path("target/gpu"))
    making.add_argument("--steps", type=int, default=12, help="of the training that parity looks at")
    running = commands.add_parser("run")
    running.add_argument("--only", type=measure.names(PARTS), default=list(PARTS), help=", ".join(PARTS))
    running.add_argument("--peers", type=measure.names(PEERS), default=list(PEERS), help=", ".join(PEERS))
    running.add_argument("--seconds", type=float, default=600, help="after which nothing new begins")
    running.add_argument("--chip", choices=CHIPS, help="whose artifacts; the latest that run here if not given")
    running.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command == "make":
        make(options)
    elif options.peer:
        peer(options.peer)
    else:
        run(options)


if __name__ == "__main__":
    main()
