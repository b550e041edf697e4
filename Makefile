# make demo    the whole path on this machine: train, measure, search, report, export, finetune
# make test    the tests
# make check   formatting, lint, types
# make test-transformers-4   the export tests against transformers 4.57, in an environment of their own
# make clean   removes what the three above made (never runs/)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-transformers-4 check clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The supernet and the timings are kept and used again by a second demo; an interrupted one goes on where it stopped.
demo: $(VENV)/installed
	$(BIN)/nas search --budget 80 space=tiny name=$(DEMO)
	$(BIN)/nas export run=runs/search/$(DEMO) select=all name=$(DEMO)
	$(BIN)/nas export run=runs/search/$(DEMO) select=knee name=$(DEMO)-knee
	$(BIN)/nas finetune checkpoint=runs/export/$(DEMO)-knee name=$(DEMO)
	$(BIN)/nas report run=runs/search/$(DEMO) name=$(DEMO)
	@echo "Exports: $$(ls -d runs/export/$(DEMO)/*/ | tr '\n' ' ')"
	@echo "Finetuned: runs/finetune/$(DEMO)/model"

test: $(VENV)/installed
	$(BIN)/pytest

test-transformers-4:
	$(PYTHON) -m venv $(VENV)-transformers-4
	$(VENV)-transformers-4/bin/pip install --quiet --editable '.[dev]' 'transformers==4.57.*' \
		$$(grep '^torch==' constraints.txt)
	$(VENV)-transformers-4/bin/pytest tests/test_export.py

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-transformers-4 build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
