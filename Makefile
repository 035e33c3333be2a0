# `make demo` shows a merge, `make test` runs the tests, `make check` is the whole gate.
# The first one that runs installs everything into .venv.
VENV ?= .venv
PYTHON = $(VENV)/bin/python

.PHONY: demo test check gate lint types contracts docs picture

demo: $(VENV)/installed
	$(VENV)/bin/mergekit-sd demo --force
	@printf "\n(mergekit-sd is in %s; to have it at hand: . %s/activate)\n" $(VENV)/bin $(VENV)/bin

test: $(VENV)/installed
	$(PYTHON) -m pytest

check: gate test

gate: lint types contracts

lint: $(VENV)/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(VENV)/installed
	$(PYTHON) -m mypy

contracts: $(VENV)/installed
	$(VENV)/bin/lint-imports

docs: $(VENV)/installed
	$(PYTHON) -m mergekit_sd.reference > docs/operations.md

picture: $(VENV)/installed
	$(PYTHON) docs/picture.py docs

# mergekit and lycoris are for tests that use their formulas alone: these need torch and no more.
$(VENV)/installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(PYTHON) -m pip install --quiet -c constraints.txt --no-deps mergekit lycoris-lora einops toml
	touch $@
