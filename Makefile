PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: install demo test check docs clean

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

clean:
	rm -rf $(VENV) runs site
