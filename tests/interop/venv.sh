#!/bin/sh
# Creates target/interop-venv, the Python environment of the scripts in this folder. Does nothing if the environment
# already holds these versions.
set -eu

# transformers 5.24 renames the argument past_key_values, by which this version of PEFT detects whether an encoder takes
# a prefix.
versions="torch==2.15.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0 numpy==2.4.6"

# Reads and writes GGUF. It is installed last and separately: an environment without it is not recreated.
gguf="gguf==0.19.0"
# Writes Parquet. It is installed separately, too.
pyarrow="pyarrow==26.0.1"

venv="$(cd "$(dirname "$0")/../.." && pwd)/target/interop-venv"
if ! [ -f "$venv/ready" ] || [ "$(cat "$venv/ready")" != "$versions" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    # The wheel of torch links against the CUDA libraries and does not load without them, so all of them are installed
    # although only the CPU is used.
    # shellcheck disable=SC2086  # one word per package
    "$venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check $versions
    "$venv/bin/python" -c "import peft, torch, transformers"
    # The marker is written last, so an interrupted installation is repeated.
    echo "$versions" > "$venv/ready"
fi
if ! [ -f "$venv/gguf" ] || [ "$(cat "$venv/gguf")" != "$gguf" ]; then
    "$venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check "$gguf"
    "$venv/bin/python" -c "import gguf"
    echo "$gguf" > "$venv/gguf"
fi
if ! [ -f "$venv/pyarrow" ] || [ "$(cat "$venv/pyarrow")" != "$pyarrow" ]; then
    "$venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check "$pyarrow"
    "$venv/bin/python" -c "import pyarrow.parquet"
    echo "$pyarrow" > "$venv/pyarrow"
fi
