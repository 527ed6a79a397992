# Every target sets itself up in .venv on a fresh machine: `make demo` right after cloning works.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-quick check bench clean

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

check: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

bench: .venv/stamp
	$(BIN)/python benchmarks/linear.py

clean:
	rm -rf build .venv
