"""MiniLM on SST-2 batches of 32: peftc against transformers + PEFT, both with LoRA on queries and values.

    sst2.py --weights MODEL_DIR --data SST2_DIR [--batches N] [--steps N] [--threads N]

Tokens per second count real tokens, without padding. A peer and peftc alternate, and the results are medians over the
batches. The recipe is that of sst2_pytorch.py, which trains to the end and reports the accuracy.
"""

import argparse
import random
from pathlib import Path

import measure
import sst2_pytorch as recipe

SPEC = "models/demo/sst2_lora.peft"
PEERS = {"peft_lora_f32": "PEFT, LoRA, f32", "peft_lora_bf16": "PEFT, LoRA, bf16 autocast"}


def choose(options):
    """Batches of lines `sentence<TAB>label`."""
    lines = (options.data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    random.seed(1)
    chosen = random.sample(lines, recipe.BATCH * options.batches)
    return [chosen[i : i + recipe.BATCH] for i in range(0, len(chosen), recipe.BATCH)]


def as_file(batch, path):
    path.write_text("\n".join(batch) + "\n", encoding="utf-8")


def speed(options):
    train = [options.peftc, "train", SPEC, "--weights", options.weights, "--threads", options.threads]
    precise = lambda precision: measure.PeftcSide(
        [*train, "--set", f"train.precision={precision}"], as_file, options.steps
    )
    batches, rows = choose(options), []
    for precision in ["f32", "bf16"]:
        line = precise(precision).take_all(batches)
        rows.append([f"`peftc`, LoRA, {precision}", *line.figures, "", "", f"{line.overhead:.2%}"])
    rows += measure.compare_with_peers(precise, PEERS, batches, options.seconds)
    head = ["", "tokens/s", "peak memory", "`peftc` is faster", "and smaller", "of a step no kernel"]
    measure.table("MiniLM on SST-2", head, rows)


def peer(options, name):
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import AutoTokenizer, BertModel

    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    bert = BertModel.from_pretrained(options.weights, add_pooling_layer=False)
    config = LoraConfig(
        r=recipe.RANK, lora_alpha=recipe.ALPHA, lora_dropout=recipe.DROPOUT, target_modules=["query", "value"]
    )
    model, head = get_peft_model(bert, config), nn.Linear(bert.config.hidden_size, recipe.CLASSES)
    model.train()
    trained = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.LR, weight_decay=recipe.WEIGHT_DECAY, eps=1e-6)

    def step(inputs):
        ids, mask, labels = inputs
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name.endswith("bf16")):
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            loss = nn.functional.cross_entropy(head(nn.functional.dropout(pooled, 0.1)), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.CLIP)
        optimizer.step()

    tokenizer = AutoTokenizer.from_pretrained(options.weights)
    batches = []
    for batch in choose(options):
        inputs = recipe.collate(recipe.encode(batch, tokenizer))
        batches.append((inputs, int(inputs[1].sum())))
    measure.steps(step, batches, warm_up=len(batches))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peftc", default="target/release/peftc")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="on each batch, by peftc; the first does not count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600, help="time limit for a peer, including peftc's turns")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return peer(options, options.peer)
    print(measure.machine(options.threads))
    speed(options)


if __name__ == "__main__":
    main()
