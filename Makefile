# Every target first creates the virtual environment that it needs.
#
# Variables:
#   PYTHON=...    interpreter for the environment (3.11 or newer)
#   VENV=...      folder of the environment (default .venv)
#   ARGS="..."    arguments for pytest or for the example
#   OLD="..."     versions of transformers for `make old-transformers`
#   OVERRIDE=...  requirements to install last, without the pins of constraints.txt, for example
#                 OVERRIDE="torch==2.11.*" (run `make clean` before you change it)
VENV ?= .venv
ARGS ?=
OVERRIDE ?=
WORKERS ?= 2
OLD ?= 4.50.3 5.0.0 5.5.4 5.19.0 5.22.2
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONFORMANCE := $(VENV)/.conformance
DOCS := $(VENV)/.docs
PYTEST := $(BIN)/python -m pytest
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
THREADS := $(shell nproc 2>/dev/null || echo 1)

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow old-transformers pretrain lint format types check conformance docs docs-serve tutorials study clean
# delete an incomplete environment
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: $(INSTALLED)  ## create the virtual environment

# torch is installed first and alone, because its build depends on the machine
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer was not found. Name an interpreter with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
		echo "error: '$(PYTHON)' cannot create virtual environments (is python3-venv installed?)" >&2; exit 1; }
	@echo "Creating $(VENV) with $(PYTHON). This takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch -c constraints.txt
	@$(PIP) -e ".[test,lint,tensorboard]" -c constraints.txt
	@test -z "$(OVERRIDE)" || $(PIP) --upgrade $(OVERRIDE)
	@touch $@

$(CONFORMANCE): $(INSTALLED)
	@$(PIP) -e ".[conformance]" $(if $(OVERRIDE),,-c constraints.txt)
	@touch $@

$(DOCS): $(INSTALLED)
	@$(PIP) -e ".[docs]" -c constraints.txt
	@touch $@

test: $(INSTALLED)  ## run the fast tests
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow" --durations 20 $(ARGS)

test-slow: $(INSTALLED)  ## run all tests, including slow ones
	$(PYTEST) -n $(WORKERS) --dist loadfile --durations 20 $(ARGS)

# each version with its dependencies in its own folder, with the torch of the environment
$(VENV)/old/%: $(INSTALLED)
	$(PIP) --target $@ transformers==$(notdir $@)

old-transformers: export HF_FAMILIAL_OLD_TRANSFORMERS := $(VENV)/old
old-transformers: $(addprefix $(VENV)/old/,$(OLD))  ## load configs and members in old versions of Transformers
	$(PYTEST) tests/hub/test_old_clients.py $(ARGS)

pretrain: export OMP_WAIT_POLICY := passive
pretrain: $(INSTALLED)  ## train a small family (on a GPU if there is one)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
		--dynamo_backend no --num_cpu_threads_per_process $(THREADS) examples/pretrain.py $(ARGS)

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## correct style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

check: lint types test  ## run lint, types and the fast tests

conformance: $(CONFORMANCE)  ## run the model tests of Transformers on the classes of this package
	$(BIN)/python tests/conformance/run.py -n $(WORKERS) $(ARGS)

# no network; the reference is read from the sources, the reports of studies are drawn from fit.json
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)  ## build the book in site/ (warnings are errors)
	$(BIN)/mkdocs build --strict $(ARGS)

docs-serve: export NO_MKDOCS_2_WARNING := 1
docs-serve: $(DOCS)  ## show the book at http://127.0.0.1:8000 and update it as you write
	$(BIN)/mkdocs serve $(ARGS)

tutorials: $(INSTALLED)  ## run the tutorials and write their pages
	$(BIN)/python scripts/render_tutorials.py $(ARGS)

study: $(INSTALLED)  ## run or continue studies/stdlib_cpu (hours), then fit and write the report
	$(BIN)/hf-familial sweep run studies/stdlib_cpu/design.yaml --out studies/stdlib_cpu --threads 1
	$(BIN)/hf-familial sweep run studies/stdlib_cpu/seeds.yaml --out studies/stdlib_cpu --threads 1
	$(BIN)/python studies/analyse.py studies/stdlib_cpu $(ARGS)

clean:  ## remove the environment, caches and build outputs
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site src/*.egg-info
	find src tests examples benchmarks scripts -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
