# make run    set up .venv and run the miniature study (arguments: make run ARGS="--study.seeds [0,1,2]")
# make study  set up .venv and run a paper's toy study (make study NAME=tradeoff; without NAME it lists them)
# make test   set up .venv, check style and types, run the suite (arguments: make test ARGS="-k gram")
# make test-portable  the numerical tests once more under other instruction sets and numbers of threads, in three minutes
# make bench  set up .venv and measure against the peers, in ten minutes (arguments: make bench ARGS="--seconds 300")
# make docs   set up .venv and build the site into build/docs; a warning or a broken link fails it
# make venv   set-up alone
PYTHON ?= python3
ARGS ?=
# Spinning OpenMP threads cost several times on shared cores.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false
BIN := .venv/bin

.PHONY: venv run study test test-portable bench docs lint format clean

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "ogdopt needs Python 3.10 or newer, found " + sys.version.split()[0] + "; choose one with make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[harness,dev]'
	touch $@

run: venv
	$(BIN)/ogdopt run $(ARGS)

study: venv
	$(BIN)/ogdopt study $(NAME) $(ARGS)

bench: venv .venv/bench
	$(BIN)/python -m benchmarks.bench $(ARGS)

.venv/bench: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]' && touch $@ || \
		echo "not all peers could be installed; the table names those that are missing"

docs: venv .venv/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PYTHONPATH=.:harness $(BIN)/lint-imports --no-logo

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-portable: venv
	$(BIN)/python -m tests.portable $(ARGS)

clean:
	rm -rf .venv runs build dist *.egg-info
