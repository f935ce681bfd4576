"""What the benchmarks share: training steps by peftc, peers in processes of their own, the machine's peaks, tables."""

import argparse
import json
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path


@dataclass
class Line:
    """Training steps on some batches, one after the other in one process each."""

    speeds: list  # real tokens a second, for each batch
    peak: float  # the most memory the process held, in GB
    kernels: list = field(default_factory=list)  # share of each batch's steps that kernels took

    @property
    def speed(self):
        return statistics.median(self.speeds)

    @property
    def overhead(self):
        """The share of a step that no kernel took."""
        return 1 - statistics.median(self.kernels)

    @property
    def figures(self):
        return [f"{self.speed:.0f}", f"{self.peak:.2f} GB"]


class Refused(Exception):
    """A side that does not run, and why."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def output(command, seconds=None):
    try:
        run = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Refused(f"it took over {seconds:.0f} s") from None
    if run.returncode != 0:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        raise Refused(lines[-1] if lines else f"exit code {run.returncode}")
    return run.stdout


def ours(train, batches, write, steps):
    """Runs the command `train` on each batch by itself, which `write` makes a file of."""
    line = Line([], 0.0)
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        for batch in batches:
            write(batch, data)
            printed = output([*train, "--data", data, "--out", out, "--profile", "--set", f"train.steps={steps}"])
            # The first step touches memory for the first time.
            taken = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()][1:]
            line.speeds.append(statistics.median(step["tokens_per_second"] for step in taken))
            line.kernels.append(statistics.median(step["kernel_share"] for step in taken))
            line.peak = max(line.peak, peak(printed))
    return line


def peak(printed):
    """GB, by what a training says at its end."""
    return float(re.search(r"peak ([0-9.]+) GB", printed)[1])


def steps(step, batches, warm_up):
    """A peer's side: takes `step` on each of (batch, real tokens), and prints what `peer` reads."""
    for inputs, _ in batches[:warm_up]:
        step(inputs)
    speeds = []
    for inputs, tokens in batches:
        begun = time.perf_counter()
        step(inputs)
        speeds.append(tokens / (time.perf_counter() - begun))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"speeds": speeds, "peak": peak}))


def peer(name):
    """This script once more, as the peer `name`."""
    return Line(**json.loads(output([sys.executable, *sys.argv, "--peer", name]).splitlines()[-1]))


def beside(lines, names):
    """Rows of the peers `names` beside our `lines` of the same precision: speed, ratio, memory, ratio."""
    rows = []
    for name, title in names.items():
        say(title)
        mine = lines["bf16" if "bf16" in name else "f32"]
        try:
            line = peer(name)
        except Refused as why:
            rows.append([title, f"does not run: {why}"[:160], "", "", "", ""])
            continue
        rows.append([title, *line.figures, f"{mine.speed / line.speed:.1f}×", f"{line.peak / mine.peak:.1f}×", ""])
    return rows


def flops(peftc, spec):
    """Useful operations of a training step, by what the batch holds."""
    costs = json.loads(output([peftc, "inspect", spec, "--json"]))
    passes = [costs["forward_flops"], costs["backward_flops"]]

    def count(tokens, targets, sequences, pairs):
        size = {"per_token": tokens, "per_target": targets, "per_sequence": sequences, "per_pair": pairs, "fixed": 1}
        return sum(n * part[key] for part in passes for key, n in size.items())

    return count


def peaks(threads):
    """GFLOP/s of multiplications and additions in registers, by precision."""
    bench = "cargo bench --quiet -p peft-passes --bench matmul -- --peaks --threads"
    found = dict(re.findall(r"(\w+) in registers +([0-9.]+)", output([*bench.split(), threads])))
    return {{"FMA": "f32"}.get(name, name): float(speed) for name, speed in found.items()}


def machine(threads):
    """When, where and how: the line above the tables."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"{date.today()}, {names[0] if names else 'unknown CPU'}, {threads} threads, `{command}`"


def table(title, head, rows):
    print(f"\n{title}\n")
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |", flush=True)


def names(known):
    """The type of an option that takes some of `known`, with commas between them."""

    def parse(text):
        chosen = [name for name in text.split(",") if name]
        if not set(chosen) <= set(known):
            raise argparse.ArgumentTypeError(f"some of {', '.join(known)}")
        return chosen

    return parse
