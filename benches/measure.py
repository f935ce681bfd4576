"""Shared by the benchmarks: training steps by peftc, peers in their own processes, the CPU's peak speed, tables."""

import argparse
import json
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path


@dataclass
class Line:
    """Measurements of one side: training steps on several batches."""

    speeds: list  # real tokens per second, for each batch
    peak: float  # peak memory of the process in GB
    kernels: list = field(default_factory=list)  # the share of each batch's steps that was spent in kernels

    @property
    def speed(self):
        return statistics.median(self.speeds)

    @property
    def overhead(self):
        """The share of a step that was not spent in kernels."""
        return 1 - statistics.median(self.kernels)

    @property
    def figures(self):
        return [f"{self.speed:.0f}", f"{self.peak:.2f} GB"]


class Refused(Exception):
    """A side failed to run, with the reason."""


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


class PeftcSide:
    """Runs the command `train` on each batch in a process of its own. `write` writes a batch to a file."""

    def __init__(self, train, write, steps):
        self.train, self.write, self.steps = train, write, steps
        self.line = Line([], 0.0)

    def take(self, batch):
        """Real tokens per second on the batch."""
        with tempfile.TemporaryDirectory() as folder:
            data, out = Path(folder) / "data", Path(folder) / "run"
            self.write(batch, data)
            steps = ["--set", f"train.steps={self.steps}"]
            printed = output([*self.train, "--data", data, "--out", out, "--profile", *steps])
            # The first step is left out, because it touches its memory for the first time.
            taken = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()][1:]
        speed = statistics.median(step["tokens_per_second"] for step in taken)
        self.line.speeds.append(speed)
        self.line.kernels.append(statistics.median(step["kernel_share"] for step in taken))
        self.line.peak = max(self.line.peak, peak(printed))
        return speed

    def take_all(self, batches):
        for batch in batches:
            self.take(batch)
        return self.line


def peak(printed):
    """The peak memory in GB that a training run prints at its end."""
    return float(re.search(r"peak ([0-9.]+) GB", printed)[1])


def steps(step, batches, warm_up):
    """The peer's side of [`Peer`]: runs `step` on the requested elements of `batches`, pairs of (inputs, real
    tokens)."""
    for inputs, _ in batches[:warm_up]:
        step(inputs)
    print(json.dumps({"ready": True}), flush=True)
    for asked in sys.stdin:
        inputs, tokens = batches[int(asked)]
        begun = time.perf_counter()
        step(inputs)
        print(json.dumps({"speed": tokens / (time.perf_counter() - begun)}), flush=True)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}), flush=True)


class Peer:
    """Runs this script as the peer `name`. It waits between batches, so that the other side can use the machine."""

    def __init__(self, name, seconds):
        self.until, self.seconds = time.monotonic() + seconds, seconds
        self.errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, *sys.argv, "--peer", name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        self.line = Line([], 0.0)

    def __enter__(self):
        self.answer("ready")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def take(self, batch):
        """Real tokens per second on the batch with this number."""
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        self.line.speeds.append(self.answer("speed"))
        return self.line.speeds[-1]

    def end(self):
        self.process.stdin.close()
        self.line.peak = self.answer("peak")

    def answer(self, key):
        alarm = threading.Timer(max(0.0, self.until - time.monotonic()), self.process.kill)
        alarm.start()
        try:
            for text in self.process.stdout:
                if text.startswith(f'{{"{key}"'):
                    return json.loads(text)[key]
        finally:
            alarm.cancel()
        if time.monotonic() >= self.until:
            raise Refused(f"it took over {self.seconds:.0f} s")
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        raise Refused(lines[-1] if lines else f"exit code {self.process.wait()}")


def compare_with_peers(mine, names, batches, seconds):
    """Rows of the peers `names`. Each peer alternates with peftc batch by batch, because the machine's speed may
    change over time. `mine` returns a [`PeftcSide`] for a precision."""
    rows = []
    for name, title in names.items():
        say(title)
        side, ratios = mine("bf16" if "bf16" in name else "f32"), []
        try:
            with Peer(name, seconds) as them:
                for number, batch in enumerate(batches):
                    ratios.append(side.take(batch) / them.take(number))
                them.end()
        except Refused as why:
            rows.append([title, f"does not run: {why}"[:160], "", "", "", ""])
            continue
        faster, smaller = statistics.median(ratios), them.line.peak / side.line.peak
        rows.append([title, *them.line.figures, f"{faster:.1f}×", f"{smaller:.1f}×", ""])
    return rows


def flops(peftc, spec):
    """A function that counts the operations of a training step for given batch sizes."""
    costs = json.loads(output([peftc, "inspect", spec, "--json"]))
    passes = [costs["forward_flops"], costs["backward_flops"]]

    def count(tokens, targets, sequences, pairs):
        size = {"per_token": tokens, "per_target": targets, "per_sequence": sequences, "per_pair": pairs, "fixed": 1}
        return sum(n * part[key] for part in passes for key, n in size.items())

    return count


def peaks(threads):
    """Peak GFLOP/s of multiply-adds in registers, by precision."""
    bench = "cargo bench --quiet -p peft-passes --bench matmul -- --peaks --threads"
    found = dict(re.findall(r"(\w+) in registers +([0-9.]+)", output([*bench.split(), threads])))
    return {{"FMA": "f32"}.get(name, name): float(speed) for name, speed in found.items()}


def machine(threads):
    """The date, the CPU and the command: the line above the tables."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"{date.today()}, {names[0] if names else 'unknown CPU'}, {threads} threads, `{command}`"


def table(title, head, rows):
    print(f"\n{title}\n")
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |", flush=True)


def names(known):
    """The type of an option whose value is a comma-separated list of names in `known`."""

    def parse(text):
        chosen = [name for name in text.split(",") if name]
        if not set(chosen) <= set(known):
            raise argparse.ArgumentTypeError(f"some of {', '.join(known)}")
        return chosen

    return parse
