# `make demo` and `make test` are the two commands a newcomer needs; each prepares the environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: demo test lint lab figures bench bench-peers clean help

help:
	@echo "make demo   the whole study on the demo model; ends with the path of a report"
	@echo "make test   lint, types and all tests"
	@echo "make figures  the paper's figures, published numbers beside those of the demo model"
	@echo "make bench  measured ratios against TransformerLens and transformers"
	@echo "make bench-peers  the same against other steering libraries, in environments of their own"
	@echo "make lab    JupyterLab on the notebooks"

# The environment is made once, and again when what it is made from changes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[utility]" >/dev/null 2>&1 \
	  || echo "reasoning-gym could not be built here (one of its parts needs a compiler); its tests are skipped"
	@touch $@

demo: $(STAMP)
	$(BIN)/sgworkbench demo --out demo_run

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

figures: $(STAMP)
	$(BIN)/sgworkbench figures --out figures

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

bench-peers: $(STAMP)
	$(BIN)/python benchmarks/peers.py

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir notebooks

clean:
	rm -rf $(VENV) demo_run
