"""Masked batches with transformers' results: left padding, holes, and padding without the padding id.

    python tests/interop/masks.py

writes `tests/interop/masks/NAME.safetensors`: `weights.*` of a tiny model, `inputs.*`, and `expect.logits`, which
`peftc run --entry forward` has to reproduce at real tokens. The model computes the positions itself, as for callers
that pass only `input_ids` and `attention_mask`.
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

FOLDER = Path(__file__).parent / "masks"
VOCAB, WIDTH, CONTEXT = 20, 16, 12
ENCODER = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=2
)
# The rows have left padding, a hole, and right padding. Masked ids vary; the id 1 is RoBERTa's padding.
IDS = torch.tensor([[1, 7, 5, 6, 9, 3], [4, 8, 11, 2, 1, 5], [6, 3, 9, 5, 1, 1]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 0, 0]])


class MeanPooled(torch.nn.Module):
    """BERT with the mean over its real tokens, as in sentence encoders; our `pooling: "mean"`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        hidden = self.model.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[:, :, None].to(hidden.dtype)
        return self.model.classifier((hidden * weight).sum(1) / weight.sum(1))


def models():
    torch.manual_seed(3)
    bert = BertForSequenceClassification(BertConfig(**ENCODER, max_position_embeddings=CONTEXT))
    yield "bert", bert, MeanPooled(bert)
    bert = BertForSequenceClassification(BertConfig(**ENCODER, max_position_embeddings=CONTEXT))
    yield "bert_first", bert, bert
    roberta = RobertaForSequenceClassification(
        RobertaConfig(**ENCODER, max_position_embeddings=CONTEXT, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)
    )
    yield "roberta", roberta, roberta
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=24, n_positions=CONTEXT)
    )
    yield "gpt2", gpt2, gpt2
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=CONTEXT,
        )
    )
    yield "llama", llama, llama


def write(name, model, called):
    model.eval()
    with torch.no_grad():
        # Larger parameters make differences visible.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
        # Models that read the first token of a row get rows in which it is not masked.
        first = name in ("bert_first", "roberta")
        ids, mask = (IDS[1:], MASK[1:]) if first else (IDS, MASK)
        logits = called(input_ids=ids, attention_mask=mask)
    logits = getattr(logits, "logits", logits)
    kept = {k: v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    kept = {k: v for k, v in kept.items() if not (name == "bert" and "pooler" in k)}
    kept = {k: v for k, v in kept.items() if not (name == "gpt2" and k == "lm_head.weight")}
    tensors = {f"weights.{k}": v.clone().contiguous() for k, v in kept.items()}
    tensors |= {"inputs.ids": ids.clone(), "inputs.mask": mask.clone(), "expect.logits": logits.clone()}
    FOLDER.mkdir(exist_ok=True)
    save_file(tensors, FOLDER / f"{name}.safetensors")


for case in models():
    write(*case)
