# Everything sets itself up: `make lab`, `make test`, `make docs`. Choose another Python with `make PYTHON=python3.12 lab`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?=
STAMP := $(VENV)/paperbench-setup

.PHONY: help lab test docs docs-serve bench bench-gpu export check clean-outputs
.DEFAULT_GOAL := help

help:
	@echo "make lab [ARGS=\"--no-browser --port 8899\"]   JupyterLab on the home page"
	@echo "make test                                    run every notebook and every test"
	@echo "make docs, make docs-serve                   build the site; look at it on 127.0.0.1"
	@echo "make bench                                   measure the kernels of this machine"
	@echo "make export, make check                      library and tests from the notebooks; the contract"

$(STAMP): constraints.txt settings.ini pyproject.toml setup.py bootstrap.py
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer was not found; name one: make PYTHON=/path/to/python3 ..."; exit 1; }
	@VENV="$(VENV)" $(PYTHON) bootstrap.py
	@touch $@

lab: $(STAMP)
	@$(BIN)/paperbench open $(ARGS)

# Notebooks first, on all cores; then the tests, which read what the notebooks left.
test: $(STAMP)
	@$(BIN)/paperbench run all --timeout 300 $(if $(WORKERS),--workers $(WORKERS)) || echo "some notebooks are red; the tests below say which"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS) tests

docs: $(STAMP)
	@$(BIN)/paperbench run all $(if $(WORKERS),--workers $(WORKERS))
	@$(BIN)/paperbench docs $(ARGS)

docs-serve: docs
	@$(BIN)/paperbench docs --serve $(ARGS)

bench: $(STAMP)
	@$(BIN)/paperbench bench --device cpu $(ARGS)

bench-gpu: $(STAMP)
	@$(BIN)/paperbench bench --device cuda $(ARGS)

export: $(STAMP)
	@$(BIN)/paperbench clean && $(BIN)/paperbench export

check: $(STAMP)
	@$(BIN)/paperbench check $(ARGS)
