# make demo    the whole path on this machine: train, measure, search, report, export, finetune
# make test    the tests
# make check   formatting, lint, types
# make docs    the documentation site, to open from the disk: build/docs/index.html
# make test-transformers-4   what reads and writes checkpoints, against transformers 4.57, in an environment of its own
# make engines   exported models in the real engines, each in an environment of its own (some 20 GB): docs/engines.csv
# make clean   removes what these made (never runs/)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An interrupted demo keeps its name here, and goes on with the first step that is not complete.
UNFINISHED := runs/.demo
# A thread is enough for models so small: more of them spin while they wait for each other, and for cores that are busy.
nas = @echo "nas $(1)"; OMP_NUM_THREADS=1 $(BIN)/nas $(1) || { echo "make demo goes on here; remove $(UNFINISHED) to start a new one"; exit 1; }
DEMO := $(shell cat $(UNFINISHED) 2>/dev/null || echo demo-$$(date +%Y%m%d-%H%M%S))
SEARCHED := runs/search/$(DEMO)/complete.json
EXPORTED := runs/export/$(DEMO)/complete.json
KNEE := runs/export/$(DEMO)-knee/complete.json
FINETUNED := runs/finetune/$(DEMO)/complete.json
REPORTED := runs/report/$(DEMO)/complete.json

.PHONY: demo test test-transformers-4 check docs engines clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: $(REPORTED)
	@echo "Exports: $$(ls -d runs/export/$(DEMO)/*/ | tr '\n' ' ')"
	@echo "Finetuned: runs/finetune/$(DEMO)/model"
	@echo "Report, to open in a browser: runs/report/$(DEMO)/report.html"
	@rm -f $(UNFINISHED)

$(SEARCHED): | $(VENV)/installed
	@mkdir -p runs && echo $(DEMO) > $(UNFINISHED)
	$(call nas,search --budget 80 space=tiny train.steps=350 name=$(DEMO))

$(EXPORTED): | $(SEARCHED)
	$(call nas,export run=runs/search/$(DEMO) select=all name=$(DEMO))

$(KNEE): | $(EXPORTED)
	$(call nas,export run=runs/search/$(DEMO) select=knee name=$(DEMO)-knee)

$(FINETUNED): | $(KNEE)
	$(call nas,finetune checkpoint=runs/export/$(DEMO)-knee train.steps=60 name=$(DEMO))

$(REPORTED): | $(FINETUNED)
	$(call nas,report run=runs/search/$(DEMO) name=$(DEMO))

# A core each: models so small gain nothing from more threads.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

test-transformers-4:
	$(PYTHON) -m venv $(VENV)-transformers-4
	$(VENV)-transformers-4/bin/pip install --quiet --editable '.[dev]' 'transformers==4.57.*' \
		$$(grep '^torch==' constraints.txt)
	$(VENV)-transformers-4/bin/pytest tests/test_export.py tests/test_export_formats.py tests/test_pretrained.py

engines: $(VENV)/installed
	$(BIN)/python scripts/engines_check.py

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed
	rm -rf build/docs
	$(BIN)/sphinx-build -nEWq --keep-going -c docs . build/docs
	cp build/docs/README.html build/docs/index.html
	@echo "Documentation, to open in a browser: build/docs/index.html"

clean:
	rm -rf $(VENV) $(VENV)-transformers-4 .engines build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
