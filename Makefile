# The two commands: `make train` trains a small GPT on real text; `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=

.PHONY: install extras train test test-all test-clusters corpora sweep kills faults values lint format docs bench bench-gpu test-gpu clean

install: .venv/.dev

# What `make train` leaves out: TensorBoard files (log.tensorboard=true), comparisons with transformers (export --check), the
# libraries of data.clean, and the other engines (engine=deepspeed, engine=accelerate).
extras: .venv/.run
	$(PIP) -e '.[tensorboard,transformers,data,deepspeed,accelerate,evaluate,serve]'

train: .venv/.run
	@$(BIN)/megatrain train $(ARGS)

# Two workers with one compute thread each: the suite is made for two cores. Layouts start up to eight processes of
# their own, so they come after the rest.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/distributed --ignore tests/clusters -m "not slow and not gpu" $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed tests/clusters -m "not slow" $(ARGS)

test-all: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/distributed --ignore tests/clusters -m "not gpu" $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed tests/clusters $(ARGS)

# Real text for tests/e2e/test_real_corpora.py, which is skipped without it.
corpora: .venv/bin/python
	tests/corpora/fetch.sh $(BIN)/python .corpora

# Layouts drawn at random; more: make sweep EXAMPLES=1000, another draw: ARGS=--hypothesis-seed=1
EXAMPLES ?= 100
sweep: .venv/.dev
	OMP_NUM_THREADS=1 SWEEP_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -s tests/distributed/test_random_layouts.py \
	  --hypothesis-show-statistics $(ARGS)

# The launchers on real SLURM and ssh hosts, each in a network namespace. Needs root and: apt-get install slurm-wlm munge
# openssh-server iproute2; what is absent is skipped.
test-clusters: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/clusters $(ARGS)

# Processes killed in the middle of saves that several make together; another draw: KILLS_SEED=21
COUNT ?= 50
kills: .venv/.dev
	OMP_NUM_THREADS=1 KILLS=$(COUNT) $(BIN)/python -m pytest -s tests/distributed/test_killed_saves.py $(ARGS)

# Faults at random moments of small runs in random layouts, with a table of what became of them.
faults: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --count $(COUNT) $(ARGS)

# Config values drawn at random from the schema: refused, or a run that trains. More: make values EXAMPLES=5000
values: .venv/.dev
	OMP_NUM_THREADS=1 VALUES_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/unit/train/test_config_values.py \
	  --hypothesis-show-statistics $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=kernels $(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a website in site/; a broken link or reference is an error. To read it:
# .venv/bin/python -m http.server --directory site
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

# Training speed on this machine, side by side with Hugging Face models in a plain PyTorch loop.
bench: .venv/.dev
	$(BIN)/python -m benchmarks.side_by_side $(ARGS)

# What a GPU can tell, in seven minutes; elsewhere without installation: PYTHONPATH=.:kernels python -m benchmarks.gpu
bench-gpu: .venv/.dev
	$(BIN)/python -m benchmarks.gpu --out runs/gpu $(ARGS)

test-gpu: .venv/.dev
	$(BIN)/python -m pytest tests/gpu $(ARGS)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "MegaTrain needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

# An editable install is made again only when what it depends on has changed.
.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing MegaTrain into .venv (a few minutes the first time)"
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.run
	@echo "Installing the development tools into .venv"
	$(PIP) -e '.[dev]'
	@touch $@

.venv/.docs: .venv/.run
	@echo "Installing the documentation tools into .venv"
	$(PIP) -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache
