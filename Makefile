# make report · make test · make lab: each creates .venv on first use, and only then.
#
# Parameters of a report and of the bench are given on the command line, e.g.
#   make report MODEL=resnet50 IMAGES="my photos" LIMIT=20
#   make report REPORT=benchmark MODEL=resnet50 DATA="my photos" LIMIT=20
# `make help` lists them all; they are the parameters of the notebooks in notebooks/reports/.

# Threads that wait leave the processor to other programs (opticam_lite/__init__.py), in lessons that
# import PyTorch first, too.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help report bench test check lint format record lab lock clean clean-all

# The first Python that is new enough; another one: make PYTHON=/path/to/python3.12 …
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; \
	done)
PY := .venv/bin/python
READY := .venv/.ready
TEST_READY := $(READY)

# What was written on make's own command line (not what the environment happens to hold).
# Make puts these variables into the environment of the recipe, so a value may hold any character.
GIVEN = $(filter-out PYTHON,$(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v)))

# The explorer is tried in a real browser where there is one.
FOUND_CHROMIUM = $(CHROMIUM)$(shell command -v chromium chromium-browser google-chrome)
NO_BROWSER = $(if $(strip $(FOUND_CHROMIUM)),,--ignore=tests/explorer/test_browser.py)

help:
	@echo 'make report   two reports -> build/saliency_report/saliency_report.html, build/benchmark_report/… (a third: REPORT=boxes)'
	@echo 'make test     style, types, architecture, tests, lessons: what must pass, in minutes'
	@echo 'make check    all tests, also the slow ones, and their coverage'
	@echo 'make bench    methods against their peers: time, memory, agreement -> build/bench/bench.md'
	@echo 'make lab      JupyterLab on the lessons'
	@echo 'make lint     style, types and architecture only'
	@echo 'make format   put code and notebooks into shape, strip outputs'
	@echo 'make record   execute the lessons and keep the results that make test compares'
	@echo 'make lock     renew requirements.lock from pyproject.toml'
	@echo 'make clean    remove build/ and caches (make clean-all: .venv, too)'
	@if [ -e $(READY) ]; then echo && $(PY) -m opticam_lite.reports --help && echo && $(PY) -m tests.bench --help; fi

# The stamp is written last, so a set-up that was cut short is done again from the start.
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "opticam_lite needs Python 3.11 or newer, but '$(if $(PYTHON),$(PYTHON),python3)' is older or missing: install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Setting up .venv from requirements.lock (PyTorch is large: some minutes the first time)"
	@test -e $@ || "$(PYTHON)" -m venv --clear .venv || { \
		echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu, install python3-venv first" >&2; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

report: $(READY)
	@$(PY) -m opticam_lite.reports $(foreach v,$(GIVEN),$(v)="$$$(v)")

bench: $(READY)
	@$(PY) -m tests.bench $(foreach v,$(GIVEN),$(v)="$$$(v)")

lint: $(TEST_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'from importlinter.cli import lint_imports_command as main; main()'

# Two processes of one thread each: most tests are too small for two threads. A notebook's cells stay
# together, in their order, and files come in the order that tests/conftest.py gives them.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder
LONGEST := $(wildcard notebooks/0[456]_*.ipynb)
LESSONS = $(LONGEST) $(filter-out $(LONGEST),$(wildcard notebooks/*.ipynb))
test check: export OMP_NUM_THREADS := 1
test: lint
	$(PY) -m pytest $(PARALLEL) -m "not slow" $(if $(COVERAGE),--cov --cov-report=)
	$(PY) -m pytest $(PARALLEL) --nbval-lax --nbval-current-env --nbval-cell-timeout=180 -o filterwarnings=default $(LESSONS)

# All tests, for the coverage of all. It slows them down by a third, so `make test` goes without; what
# `make test COVERAGE=1` has measured of the code as it is now is not run again.
MEASURED = $(if $(wildcard .coverage),$(if $(shell find opticam_lite tests -name '*.py' -newer .coverage),,yes))
check: $(TEST_READY)
	@$(if $(NO_BROWSER),echo "No Chromium here: the explorer's browser tests are left out (apt-get install chromium)")
	$(PY) -m pytest $(PARALLEL) $(NO_BROWSER) $(if $(MEASURED),-m slow --cov-append) --cov --cov-report=term --cov-fail-under=90; \
		status=$$?; rm -f .coverage; exit $$status

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) -m nbstripout --keep-count --keep-id notebooks/*.ipynb notebooks/reports/*.ipynb

# The few results that a lesson keeps, for nbval to compare with.
record: $(READY)
	$(PY) -m nbconvert --to notebook --execute --inplace --log-level=ERROR \
		--ExecutePreprocessor.record_timing=False $(or $(NOTEBOOKS),$(wildcard notebooks/*.ipynb))
	$(MAKE) format

lab: $(READY)
	$(PY) -m jupyterlab notebooks

lock: $(READY)
	$(PY) -m pip install --quiet uv
	$(PY) -m uv pip compile --universal --python-version 3.11 --all-extras --upgrade --quiet \
		--no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
		--output-file requirements.lock pyproject.toml

clean:
	rm -rf build dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

clean-all: clean
	rm -rf .venv
