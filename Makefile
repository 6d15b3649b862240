# Fourfold. A fresh clone needs Python 3.11 or newer, make and a C compiler; everything else goes into .venv.
PYTHON ?= python3
ARGS   ?=
SYSTEM ?=
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  PYTHON=python3.12   the interpreter that .venv is made with'
	@echo '  ARGS="model=nano"   what to change in the training run; make train ARGS=--help lists it'
	@echo '  SYSTEM=1            a host without network: take PyTorch from PYTHON, the rest from wheels/'

install: $(STAMP)  ## make .venv and install Fourfold in it (the other targets do this by themselves)

train: $(STAMP)  ## train a small model on this computer
	@$(BIN)/python -m train $(ARGS)

test: $(STAMP)  ## style, types and the tests that need no GPU
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not gpu" $(ARGS)

faults: $(STAMP)  ## 50 tiny runs that random faults happen to: five to ten minutes
	@$(BIN)/python -m tests.faults --runs 50 $(ARGS)

clean:  ## remove .venv and every cache; runs/ stays
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Fourfold needs Python 3.11 or newer as PYTHON ($(PYTHON)); try: make PYTHON=python3.12'; exit 1; }
ifdef SYSTEM
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	@$(PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' > $(VENV)/host.pth
	@mv $(VENV)/host.pth $(VENV)/lib/python*/site-packages/
	@$(PYTHON) -m pip --python $(BIN)/python install -qq --no-index --no-deps wheels/*.whl
else
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python launch/install_torch.py
	@echo 'Installing Fourfold and its dependencies ...'
	@$(BIN)/pip install -qq --editable '.[dev]'
endif
	@touch $@

.PHONY: help install train test faults clean
