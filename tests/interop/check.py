"""Checks the folders that peftc wrote for the cases in this folder with transformers and PEFT.

    check.py WORK_DIR [--expect exported] [--expect merged]

For each case NAME it loads, if present, WORK_DIR/NAME/exported (an adapter, applied to the case's base model) and
WORK_DIR/NAME/merged (a whole model), and compares the logits with those of the case. `--expect` makes a missing folder
an error. A prefix cannot be merged, so no `merged` folder is expected for it.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

from common import CASES, load_model, run
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

KINDS = ["exported", "merged"]
TOLERANCE = 1e-5


def load_complete(folder):
    """The model in `folder`, which must hold exactly the model's tensors."""
    model, info = load_model(folder)
    complaints = {what: sorted(names) for what, names in info.items() if names}
    if complaints:
        raise ValueError(f"transformers complains: {complaints}")
    return model


def load_exported(case, folder):
    model = PeftModel.from_pretrained(load_complete(case / "base"), folder)
    # PEFT ignores tensors that it does not know, so they are compared here.
    written = load_file(folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    # `modules_to_save` and `bias` may both name a tensor, which PEFT then stores several times.
    loaded = {name: x for name, x in loaded.items() if ".modules_to_save." not in name and ".original_module." not in name}
    missing, unexpected = loaded.keys() - written.keys(), written.keys() - loaded.keys()
    if missing or unexpected:
        raise ValueError(f"missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    changed = sorted(name for name in written if not written[name].equal(loaded[name]))
    if changed:
        raise ValueError(f"not loaded as written: {changed}")
    return model


def gap(case, kind, folder):
    """The difference between the logits and the expected ones, and the allowed difference."""
    model = load_exported(case, folder) if kind == "exported" else load_complete(folder)
    tensors = load_file(case / "case.safetensors")
    expected = tensors["expect.logits"]
    found = run(model, tensors)
    if found.shape != expected.shape:
        raise ValueError(f"the logits are {list(found.shape)}, not {list(expected.shape)}")
    return (found - expected).abs().max().item(), TOLERANCE


def check(case, kind, folder):
    try:
        found, allowed = gap(case, kind, folder)
    except Exception as error:  # whatever exception the libraries raise, the folder cannot be loaded
        print(f"{case.name} {kind}: FAILED, {type(error).__name__}: {error}")
        return False
    good = found <= allowed  # false for NaN
    print(f"{case.name} {kind}: {'ok' if good else 'FAILED'}, off by {found:.2e} of at most {allowed:.2e}")
    return good


def mergeable(case):
    return json.loads((case / "adapter" / "adapter_config.json").read_text())["peft_type"] != "PREFIX_TUNING"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--expect", action="append", choices=KINDS, default=[])
    args = parser.parse_args()
    # load_exported checks the tensors itself, so the warnings are not needed.
    warnings.simplefilter("ignore")

    passed = failed = 0
    for case in sorted(CASES.iterdir()):
        for kind in KINDS:
            folder = args.work_dir / case.name / kind
            if folder.is_dir():
                good = check(case, kind, folder)
            elif kind in args.expect and "residual" not in case.name and (kind == "exported" or mergeable(case)):
                print(f"{case.name} {kind}: FAILED, there is no {folder}")
                good = False
            else:
                continue
            passed, failed = passed + good, failed + (not good)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0 or passed == 0)


if __name__ == "__main__":
    main()
