PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: install demo test check docs screens clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --constraint constraints.txt --editable ".[demo,test,docs]"
	touch $@

demo: install
	$(RUN)/fastntk demo

test: install
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist loadfile

check: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

docs: install
	$(RUN)/mkdocs build --strict

# What a browser makes of the pages, in runs/screens: needs Chromium, and the demo's report from make demo
screens: install
	$(RUN)/python tests/screens.py runs/demo/report.html results/tables.html

clean:
	rm -rf $(VENV) runs site
