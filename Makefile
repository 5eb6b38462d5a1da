# Two commands: `make demo` shows the whole system, `make test` checks it. Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := shards pipelines models jobs

.PHONY: demo test lint gpu-check clean

demo: $(VENV)/.ready-generate
	$(BIN)/hardviews demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# On a CUDA machine, with the interpreter that has torch and the other packages: make gpu-check PYTHON=python3
# PARTS="machine models" picks some of the parts; docs/gpu.md lists them.
gpu-check:
	$(PYTHON) -m jobs.benches.gpu benchmarks/results $(PARTS)

# One stamp per set of extras; the dev extras contain the others.
$(VENV)/.ready-%: pyproject.toml constraints.txt pipelines/crop.c
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else f"hardviews needs Python 3.11 or 3.12, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info pipelines/*.so .pytest_cache .ruff_cache
