PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: install demo test check docs screens package oldest newest clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --constraint constraints.txt --editable ".[demo,test,docs]"
	touch $@ $(VENV)/demo-installed

# What the demo needs alone, compiled as it is imported: half the time
$(VENV)/demo-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --no-compile --constraint constraints.txt --editable ".[demo]"
	touch $@

demo: $(VENV)/demo-installed
	$(RUN)/fastntk demo

test: install
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

docs: install
	$(RUN)/mkdocs build --strict

# What a browser makes of the demo's report and the grid's page, in runs/screens: needs Chromium, and the demo's report from make demo
screens: install
	$(RUN)/python tests/screens.py runs/demo/report.html results/tables.html

# Wheel and sdist in dist/, checked, installed into an empty environment and tried there; SITE= address of the files
package: install
	$(RUN)/pip install --quiet --constraint constraints.txt --editable ".[release]"
	$(RUN)/python tests/package.py $(if $(SITE),--site $(SITE)) $(if $(ONLY_BUILD),--only-build)

# The tests once with the lowest versions that pyproject.toml allows, and once with the newest, each in a .venv of its own
oldest newest:
	$(PYTHON) -m venv .venv-$@
	$(PYTHON) tests/versions.py $@ > .venv-$@/constraints.txt
	.venv-$@/bin/pip install --constraint .venv-$@/constraints.txt --editable ".[demo,test]"
	OMP_NUM_THREADS=1 .venv-$@/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs site dist
