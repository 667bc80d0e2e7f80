# Two commands do all the set-up: `make sweep` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: install sweep test test-all lint ui benchmarks clean

install: $(VENV)/.installed

# The stamp is touched last: an interrupted installation is done again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

sweep: install
	$(BIN)/python sweeps/grok_wd_layers.py $(ARGS)

# Two processes, each with whole files in the order of tests/conftest.py.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: install
	$(BIN)/python -m pytest -m 'not gpu' --timeout 1200 $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: install
	$(BIN)/groundswell ui $(ARGS)

benchmarks: install
	for name in step_time loop_overhead sweep_efficiency reversal_epochs tracing probe_pool scaling arithmetic_step grid_eval edge_step implicit_cot_step; do $(BIN)/python tests/benchmarks/$$name.py || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info
