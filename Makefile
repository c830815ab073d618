# Two commands set up everything they need: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
# What `make test-fast` runs.
TESTS ?= tests
PYTEST := $(BIN)/python -m pytest -n $(JOBS)

.PHONY: demo test test-fast lint types docs examples clean

# The stamp is newer than pyproject.toml once everything is installed.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("numpyro_rtk needs Python 3.11 or newer; set PYTHON=python3.x") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[examples]"
	touch $@

$(VENV)/developing: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group test --group lint --group docs
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/mixture.py --output demo-output
	$(BIN)/python examples/galaxies.py --output demo-output
	$(BIN)/python examples/posterior_mixture.py --output demo-output
	$(BIN)/python examples/galaxy_restore.py --output demo-output
	@echo "Figures and NetCDF files are in demo-output/"

test: $(VENV)/developing
	$(PYTEST) --dist loadfile --no-loadscope-reorder --ignore tests/test_law.py
	OPTIMIZED=1 $(PYTEST) --dist load tests/test_law.py

test-fast: $(VENV)/developing
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not slow" $(TESTS)

lint: $(VENV)/developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/developing
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/developing
	$(BIN)/mkdocs build --strict --site-dir .site

examples: $(addprefix example-,population galaxy_restore galaxy_counts galaxy_blend galaxies posterior_mixture mixture two_processes)

example-%: $(VENV)/installed
	$(BIN)/python examples/$*.py --small --output .examples-output

clean:
	rm -rf $(VENV) .site .examples-output demo-output
