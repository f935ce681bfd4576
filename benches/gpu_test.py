"""Tests of gpu.py's helpers: `python3 benches/gpu_test.py`, without a GPU and without torch."""

import argparse
import array
import contextlib
import io
import json
import struct
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import gpu
from measure import Line, Refused


class Gpu(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        here = mock.patch.object(gpu, "HERE", self.folder)
        here.start()
        self.addCleanup(here.stop)

    def program(self, script):
        """Writes a script in place of peftc."""
        path = self.folder / "peftc"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def printed(self, part, **options):
        out = io.StringIO()
        options = argparse.Namespace(chip="sm_80", left=gpu.TimeLeft(100), peers=[], **options)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            right = part(options)
        return right, out.getvalue()

    def test_gaps(self):
        numbers = lambda *x: {"a": array.array("f", x)}
        self.assertEqual(gpu.gap(numbers(1, -4), numbers(1, -4))[0], 0.0)
        self.assertEqual(gpu.gap(numbers(1, -3), numbers(1, -4)), (0.25, "a"))
        self.assertEqual(gpu.gap(numbers(1, float("nan")), numbers(1, 2))[0], float("inf"))
        self.assertEqual(gpu.gap({}, numbers(1))[0], float("inf"))
        self.assertEqual(gpu.gap(numbers(0), numbers(0))[0], 0.0)

    def test_tensors_in_files(self):
        path = self.folder / "x"
        gpu.write_ints(path, {"a": [[1, 2], [3, 4]], "b": [5]})
        content = path.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        self.assertEqual((header["a"]["shape"], header["b"]["data_offsets"]), ([2, 2], [32, 40]))
        self.assertEqual(struct.unpack("<5q", content[8 + length :]), (1, 2, 3, 4, 5))
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 0.5, -2))
        self.assertEqual(gpu.floats(path), {"a": array.array("f", [0.5, -2])})

    def test_without_a_gpu(self):
        self.program("echo 'error: no CUDA driver is installed' >&2; exit 3")
        said = io.StringIO()
        with contextlib.redirect_stderr(said), self.assertRaises(SystemExit) as ended:
            gpu.chip(self.folder)
        self.assertEqual(ended.exception.code, 3)
        self.assertIn("no CUDA driver is installed", said.getvalue())

    def test_the_latest_chip_that_runs(self):
        self.program('case "$2" in *sm_90*) echo "compiled for sm_90: here is an A100" >&2; exit 3;; esac')
        self.assertEqual(gpu.chip(self.folder), "sm_80")

    def test_speed(self):
        limits = {f"{method}.sm_80.{p}": {"tokens": 4000, "card": "A100"} for method in gpu.METHODS for p in gpu.PRECISIONS}
        (self.folder / "roofline.json").write_text(json.dumps(limits))
        of_ours = lambda options, method, precision: Line([1000, 3000, 2000], 1.5)
        theirs = json.dumps({"speeds": [500, 400, 600], "peak": 3.0})
        with mock.patch.object(gpu, "ours", of_ours), mock.patch("measure.output", lambda *_: f"warning\n{theirs}\n"):
            options = argparse.Namespace(chip="sm_80", left=gpu.TimeLeft(100), peers=["inducer_lora_half", "peft_lora_f32"])
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                gpu.speed(options)
        self.assertIn("| `peftc`, inducer + LoRA, half | 2000 | 1.50 GB |  | 50% of A100 |", out.getvalue())
        self.assertIn("| PyTorch, inducer + LoRA, half | 500 | 3.00 GB | 4.0× | 12% of A100 |", out.getvalue())
        self.assertIn("half is bf16", out.getvalue())

    def test_no_time_is_left(self):
        with self.assertRaises(Refused):
            gpu.TimeLeft(0.5)()
        limits = {f"{method}.sm_80.{p}": {"tokens": 1, "card": "A100"} for method in gpu.METHODS for p in gpu.PRECISIONS}
        (self.folder / "roofline.json").write_text(json.dumps(limits))
        self.program("sleep 5")
        options = argparse.Namespace(chip="sm_80", left=gpu.TimeLeft(1.5), peers=list(gpu.PEERS)[:1])
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            gpu.speed(options)
        self.assertIn("it took over 1 s", out.getvalue())
        self.assertEqual(out.getvalue().count("no time is left"), 4)

    def test_what_is_too_far(self):
        parity = self.folder / "parity"
        parity.mkdir()
        header = json.dumps({"grad.a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        content = lambda x: struct.pack("<Q", len(header)) + header + struct.pack("<f", x)
        for name, found in [("gpt2", 1.0), ("bert", 1.01)]:
            (parity / f"{name}.expected").write_bytes(content(1.0))
            for precision in gpu.PRECISIONS:
                (parity / f"{name}.{gpu.kernels_of('sm_80', precision)}.{precision}.peftc").write_bytes(content(found))
        (parity / "losses.json").write_text("[7.0, 6.0]")
        # The script copies its artifact to the results, and trains with the expected losses.
        self.program(
            'if [ $1 = run ]; then for last; do :; done; cp "$2" "$last"; else\n'
            'while [ $1 != --out ]; do shift; done; printf \'{"loss": 7.0}\\n{"loss": 6.0}\\n\' > "$2/metrics.jsonl"; fi'
        )
        right, out = self.printed(gpu.parity)
        self.assertFalse(right)
        self.assertIn("| bert: gradients, f32 | 1.0e-02 | 1e-04 | TOO FAR: `grad.a` |", out)
        self.assertEqual(out.count("near enough"), 5)


if __name__ == "__main__":
    sys.exit(unittest.main(argv=sys.argv[:1]))
