#!/bin/sh
# Trains the SST-2 recipe with PyTorch, in a virtual environment of its own, beside which
# `peftc train models/demo/sst2_lora.peft` can be held.
#
#     benches/sst2.sh WEIGHTS_DIR SST2_DIR [options of sst2_pytorch.py]
set -eu
if [ $# -lt 2 ]; then
    echo "usage: benches/sst2.sh WEIGHTS_DIR SST2_DIR [--limit N] [--by-length] [--seed N] [--threads N]" >&2
    exit 2
fi
weights=$(realpath "$1") data=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."

venv=target/bench-venv
if [ ! -e "$venv/ready" ]; then
    mkdir -p target
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet torch transformers safetensors
    touch "$venv/ready"
fi
exec "$venv/bin/python" benches/sst2_pytorch.py --weights "$weights" --data "$data" "$@"
