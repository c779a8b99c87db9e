# Every target makes .venv when it is missing and installs what it needs; installs again only when pyproject.toml changes.
#   make test PYTHON=python3.12        another interpreter for a new .venv
#   make demo ARGS="--photo my.jpg"    arguments go through to the command
#   make bench BENCH=NAME              another script of benchmarks/
#   make bench-all ARGS=--fresh        measure again what has a result already; make accuracy ARGS=--fresh too

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BENCH  ?= vit_small_512
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
# Two installs into one .venv at the same time would break it, so no -j.
.NOTPARALLEL:
.PHONY: help demo test test-all lint bench bench-all bench-gpu accuracy zoo clean

help:
	@echo "make demo | test | test-all | lint | bench | bench-all | bench-gpu | accuracy | zoo | clean"

demo: $(VENV)/.stamp-demo
	$(PY) -m tome_fx demo $(ARGS)

# Tests trace and check on one thread each: a process for each core.
SPREAD := -n auto --dist worksteal

test: $(VENV)/.stamp-test
	$(PY) -m pytest $(SPREAD) $(ARGS)

test-all: $(VENV)/.stamp-clients
	$(PY) -m pytest $(SPREAD) -m "" $(ARGS)

lint: $(VENV)/.stamp-lint
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(VENV)/.stamp-bench
	$(PY) benchmarks/$(BENCH).py $(ARGS)

# Hours on two cores. Stopped, it goes on where it was; a setting that fails does not keep the others from running.
# make bench-all AGAINST=COMMIT runs every case in that build too, interleaved.
bench-all: $(VENV)/.stamp-bench
	$(PY) benchmarks/speed.py --all $(ARGS); status=$$?; \
	$(PY) benchmarks/growth.py $(ARGS) && $(PY) benchmarks/match_growth.py $(ARGS) && $(PY) benchmarks/shares.py $(ARGS) && \
	$(PY) benchmarks/schedules.py $(ARGS) && $(PY) benchmarks/soak.py $(ARGS) && \
	$(if $(AGAINST),$(PY) benchmarks/against.py --all --commit $(AGAINST) &&) $(PY) benchmarks/report.py && exit $$status

MODES := reduce-overhead max-autotune
bench-gpu: $(VENV)/.stamp-bench
	$(PY) benchmarks/attention_forms.py
	$(PY) benchmarks/speed.py vit_large_512 vit_huge_518 --device cuda --dtype bfloat16 --batch 32 --mode $(MODES) $(ARGS)
	$(PY) benchmarks/speed.py deit_small_r13 --device cuda --dtype bfloat16 --batch 128 --mode $(MODES) $(ARGS)
	$(PY) benchmarks/report.py

# Three hours on two cores, most of it training, and three more for the methods. A script that fails does not keep the others from running.
ACCURACY := images small_vit dense ablations speech video methods
accuracy: $(VENV)/.stamp-accuracy
	status=0; for script in $(ACCURACY); do $(PY) benchmarks/accuracy/$$script.py $(ARGS) || status=1; done; \
	$(PY) benchmarks/accuracy/report.py && exit $$status

zoo: $(VENV)/.stamp-zoo
	$(PY) benchmarks/zoo.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "tome_fx needs Python 3.10 or newer: make ... PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) could not make $(VENV) (on Debian: install python3-venv, or choose another PYTHON=)" >&2; exit 1; }
	$(PIP) --upgrade pip

# $(PY) is order-only: the interpreter is a link to a file whose date says nothing about this .venv.
$(VENV)/.stamp-%: pyproject.toml | $(PY)
	$(PIP) --editable '.[$*]'
	@touch $@
