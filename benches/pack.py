"""GPT-2 small on conversations: one example per turn against `pack: true`, where turns share a sequence.

    pack.py --data DIR [--rounds N] [--conversations N] [--threads N]

A seeded generator makes conversations with the lengths of CoQA: a passage of 270 words and 15 turns, with 5.5 words per
question and 2.7 words per answer on average. The task is the library's `coqa` with the whole history. Both sides train
for one epoch on the same conversations, round by round, with one conversation per step: 15 examples, or one. The tables
show sums over the rounds and the median of their ratios. DIR holds `tokenizers/gpt2`. Weights are random, which does
not change the timings.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from measure import machine, output, peak, say, table

SPEC = "models/paper/coqa/inducer_lora.peft"
TURNS, PASSAGE, QUESTION, ANSWER = 15, 270, 5.5, 2.7
TURN = "<question> {questions.input_text} <answer> {answers.input_text}"
TEMPLATE = f"<bos_qa> as <document> <document> {{story}} (before: {TURN})* {TURN} <eos_qa>"
# Common words, and some words that are several tokens.
WORDS = """the of and to in was he his that with for on as had at by from her she they it were which when one who not
have him been but their out up into time more there some could them other then two first any may only its these after
new over such our man me even most made also did many before must through back years where much your way well down
should because each just those people how too little state good very make world still own see men work long get here
between both life being under never day same another know while last might us great old year off come since against
go came right used take three house garden river village Eleanor Bartholomew lighthouse apothecary""".split()


def text(draw, words):
    return " ".join(draw.choice(WORDS) for _ in range(words))


def length(draw, mean):
    """A random number of words, at least one and `mean` on average."""
    return 1 + sum(draw.random() < (mean - 1) / 10 for _ in range(10))


def conversations(seed, count):
    draw = random.Random(seed)
    for _ in range(count):
        questions = [{"input_text": text(draw, length(draw, QUESTION)) + "?"} for _ in range(TURNS)]
        answers = [{"input_text": text(draw, length(draw, ANSWER))} for _ in range(TURNS)]
        yield {"story": text(draw, PASSAGE) + ".", "questions": questions, "answers": answers}


def epoch(options, rows, pack):
    """Seconds and tokens of an epoch's steps, and the peak memory in GB."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data.jsonl", Path(folder) / "run"
        data.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        settings = {
            "task.template": json.dumps(TEMPLATE),
            "task.max_tokens": 1024,
            "task.pack": "true" if pack else "false",
            "train.batch": 1 if pack else TURNS,
            "train.epochs": 1,
            "train.hold_out": 0,
            "train.warmup": 0,
        }
        command = [options.peftc, "train", SPEC, "--weights", "random", "--tokenizer", options.data / "tokenizers/gpt2"]
        command += ["--data", data, "--out", out, "--threads", options.threads]
        printed = output(command + [word for key, value in settings.items() for word in ["--set", f"{key}={value}"]])
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(step["tokens"] / step["tokens_per_second"] for step in steps)
    return seconds, sum(step["tokens"] for step in steps), peak(printed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peftc", default="target/release/peftc")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=2, help="in each round")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(machine(options.threads))
    sides = {False: [], True: []}
    for number in range(options.rounds):
        say(f"round {number + 1}")
        rows = list(conversations(number, options.conversations))
        for pack, taken in sides.items():
            taken.append(epoch(options, rows, pack))
    rows = []
    for pack, taken in sides.items():
        seconds, tokens, peaks = zip(*taken)
        ratios = [[of / its for of, its in zip(one, other)] for one, other in zip(zip(*sides[False]), (seconds, tokens))]
        faster, fewer = map(statistics.median, ratios)
        name = "`pack: true`" if pack else "an example a turn"
        share = [f"{faster:.1f}×", f"{fewer:.1f}×"] if pack else ["", ""]
        rows.append([name, f"{sum(tokens):.0f}", f"{sum(seconds):.1f} s", f"{max(peaks):.2f} GB", *share])
    count = options.rounds * options.conversations
    table(f"An epoch of {count} conversations", ["", "tokens", "time", "peak memory", "faster", "fewer tokens"], rows)


if __name__ == "__main__":
    main()
