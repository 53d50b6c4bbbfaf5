# Every target makes what it needs, the virtual environment included.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test lint clean

# One command from a trained model to two checked engines and a report.
demo: $(VENV)/.installed
	$(BIN)/export-engine run digits-dit --recipe fp8 --backend ort --backend trt-rtx --out $(DEMO)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# What the package is built of; the headers are for its native kernels, which an install goes on without.
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard engines/native/*.cpp engines/native/*.inc)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	ci/ort_headers.sh
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python $(SOURCES)
	ci/ort_headers.sh
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info engines/native/*.so engines/native/why_not.txt
