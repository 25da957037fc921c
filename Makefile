# make train   trains the quickstart          make train MINUTES=60 ARGS="--model.config.d_model 384"
# make test    runs the suite                 make test ARGS="--slow -k scan"
# make bench   measures the ops beside peers  make lint   formats, lints and checks types
# PIP_ARGS is passed to pip, for example an index that holds the CPU build of torch.
PYTHON ?= python3
PIP_ARGS ?=
MINUTES ?= 5
ARGS ?=
BIN := .venv/bin

.PHONY: train test bench lint

.venv/created: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("SeqZoo needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; pass PYTHON=python3.11") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[train,hub,dev]'
	touch $@

train: .venv/created
	$(BIN)/seqzoo train --minutes $(MINUTES) $(ARGS)

test: .venv/created
	$(BIN)/python -m pytest --ignore tests/benchmarks --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

bench: .venv/created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt '.[bench]'
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only $(ARGS)

lint: .venv/created
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/pyright
