# make check | test | test-slow | bench
PYTHON := .venv/bin/python
# what bench needs: a Qwen3 tokenizer (the tests put one here) and, to measure TRL or mbridge too, the Python of an environment
# with trl or mbridge; with LARGE=1 merge_speed measures a model of 8 GB too
TOKENIZER := .venv/npm/tokenizer-qwen3-3.7.2
TRL_PYTHON :=
MBRIDGE_PYTHON :=
LARGE :=

check:  ## style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

test:  ## the default tier
	bash tests/run.sh

test-slow:  ## everything that runs without a GPU
	bash tests/run.sh -m "not gpu"

bench:  ## every claim of speed, results as CSV in benchmarks/
	$(PYTHON) benchmarks/load_memory.py
	$(PYTHON) benchmarks/sampling.py
	$(PYTHON) benchmarks/packing.py $(if $(TRL_PYTHON),--trl_python $(TRL_PYTHON))
	$(PYTHON) benchmarks/merge_speed.py $(if $(LARGE),--large)
	MBRIDGE_PYTHON=$(MBRIDGE_PYTHON) $(PYTHON) benchmarks/bridge_speed.py
	$(PYTHON) benchmarks/save_cost.py --tokenizer finetune/example_data
	$(PYTHON) benchmarks/data_build.py --tokenizer $(TOKENIZER) $(if $(TRL_PYTHON),--trl_python $(TRL_PYTHON))

.PHONY: check test test-slow bench
