# make check | test | test-slow | bench
PYTHON := .venv/bin/python

check:  ## style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

test:  ## the default tier
	bash tests/run.sh

test-slow:  ## everything that runs without a GPU
	bash tests/run.sh -m "not gpu"

bench:  ## every claim of speed, results as CSV in benchmarks/
	@for script in $(wildcard benchmarks/*.py); do $(PYTHON) $$script || exit 1; done; echo "benchmarks: $(words $(wildcard benchmarks/*.py)) run"

.PHONY: check test test-slow bench
