#!/bin/sh
# Makes target/interop-venv, the Python that the scripts beside this file run in.
# Does nothing when the environment already holds these versions.
set -eu

# transformers 5.24 renames the argument past_key_values, by which this PEFT
# finds out whether an encoder takes a prefix.
versions="torch==2.15.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0 numpy==2.4.6"

venv="$(cd "$(dirname "$0")/../.." && pwd)/target/interop-venv"
if [ -f "$venv/ready" ] && [ "$(cat "$venv/ready")" = "$versions" ]; then
    exit 0
fi

rm -rf "$venv"
python3 -m venv "$venv"
# The wheel of torch links against the CUDA libraries and does not load without
# them, so the whole set comes along although only the CPU is used.
# shellcheck disable=SC2086  # one word per package
"$venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check $versions
"$venv/bin/python" -c "import peft, torch, transformers"
# Written last: an interrupted install leaves no marker and is made anew.
echo "$versions" > "$venv/ready"
