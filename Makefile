# The two commands: `make demo` and `make test`. Each sets everything up first; the second time that costs nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  := $(shell grep '^torch==' constraints.txt)
WORKERS := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# One thread per process: on a busy box more are slower (OpenMP's spin barriers), and Ray starts many processes.
export OMP_NUM_THREADS ?= 1
export RAY_AUTH_MODE ?= disabled
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test check format clean

setup: $(STAMP)

# torch goes first and pinned, so that nothing later pulls another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/relora demo $(ARGS)

# Tests that start a Ray cluster run one after the other: each brings its own processes. The others share the cores.
# With ARGS, such as `ARGS=tests/kernels` or `ARGS='-k attention'`, pytest runs once, with these arguments.
test: setup
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	@echo "1/2: tests without a Ray cluster, on $(WORKERS) processes"
	$(BIN)/python -m pytest -m "not ray" --numprocesses $(WORKERS) --dist worksteal
	@echo "2/2: tests that start a Ray cluster, one after the other"
	$(BIN)/python -m pytest -m ray
endif

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .relora *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
