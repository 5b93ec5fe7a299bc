# make report · make lab · make test: each sets up in .venv what it needs on first use, and only then.
#
# Parameters of a report and of the bench are given on the command line, e.g.
#   make report MODEL=resnet50 IMAGES="my photos" LIMIT=20
#   make report REPORT=benchmark MODEL=resnet50 DATA="my photos" LIMIT=20
# `make help` lists them all; they are the parameters of the notebooks in notebooks/reports/.

# Threads that wait leave the processor to other programs (opticam_lite/__init__.py), in lessons that
# import PyTorch first, too.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help report course bench test check lint format record lab lock clean clean-all

# The first Python of 3.11 to 3.14, as pyproject.toml has it: PyTorch has no later builds. Another one:
# make PYTHON=/path/to/python3.12 …
FITS = import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(FITS)' >/dev/null 2>&1 && echo $$p && break; \
	done)
PY := .venv/bin/python
# What lessons and reports run on; and what tests, style and benchmarks need beside it.
READY := .venv/.ready
TEST_READY := .venv/.ready-test

# What was written on make's own command line (not what the environment happens to hold).
# Make puts these variables into the environment of the recipe, so a value may hold any character.
GIVEN = $(filter-out PYTHON TORCH TORCH_INDEX,$(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v)))

# The explorer is tried in a real browser where there is one.
FOUND_CHROMIUM = $(CHROMIUM)$(shell command -v chromium chromium-browser google-chrome)
NO_BROWSER = $(if $(strip $(FOUND_CHROMIUM)),,--ignore=tests/explorer/test_browser.py)

help:
	@echo 'make report   two reports -> build/saliency_report/saliency_report.html, build/benchmark_report/… (more: REPORT=all)'
	@echo 'make course   the lessons for students, with solutions, and for nbgrader -> build/course/ (REPO=owner/name: launch links)'
	@echo 'make test     style, types, architecture, tests, lessons: what must pass, in minutes'
	@echo 'make check    all tests, also the slow ones, and their coverage'
	@echo 'make bench    methods against their peers: time, memory, agreement -> build/bench/bench.md'
	@echo 'make lab      JupyterLab on the lessons'
	@echo 'make lint     style, types and architecture only'
	@echo 'make format   put code and notebooks into shape, strip outputs'
	@echo 'make record   execute the lessons and keep the results that make test compares'
	@echo 'make lock     renew requirements.lock and requirements-test.lock from pyproject.toml'
	@echo 'make clean    remove build/ and caches (make clean-all: .venv, too)'
	@echo
	@echo 'TORCH=cpu or TORCH=cuda chooses the build of PyTorch at the first call (else: CUDA if there is an NVIDIA card)'
	@if [ -e $(READY) ]; then echo && $(PY) -m opticam_lite.reports --help; fi
	@if [ -e $(TEST_READY) ]; then echo && $(PY) -m tests.bench --help; fi

# A stamp is written last, so a set-up that was cut short is done again from the start.
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(FITS)' || { \
		echo "opticam_lite needs Python 3.11 to 3.14, but '$(if $(PYTHON),$(PYTHON),python3)' is another version or missing: install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" tools/set_up.py requirements.lock
	@touch $@

$(TEST_READY): requirements-test.lock $(READY)
	@$(PY) tools/set_up.py requirements-test.lock
	@touch $@

report: $(READY)
	@$(PY) -m opticam_lite.reports $(foreach v,$(GIVEN),$(v)="$$$(v)")

course: $(READY)
	@$(PY) tools/course.py $(if $(REPO),--repo "$(REPO)")

bench: $(TEST_READY)
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

format: $(TEST_READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) -m nbstripout --keep-count --keep-id notebooks/*.ipynb notebooks/reports/*.ipynb

# The few results that a lesson keeps, for nbval to compare with.
record: $(TEST_READY)
	$(PY) -m nbconvert --to notebook --execute --inplace --log-level=ERROR \
		--ExecutePreprocessor.record_timing=False $(or $(NOTEBOOKS),$(wildcard notebooks/*.ipynb))
	$(MAKE) format

lab: $(READY)
	$(PY) -m jupyterlab notebooks

# The small lock is compiled with the large one in its place, whose versions uv then keeps.
COMPILE = $(PY) -m uv pip compile --universal --python-version 3.11 --quiet \
	--no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' pyproject.toml
lock: $(TEST_READY)
	$(COMPILE) --all-extras --upgrade --output-file requirements-test.lock
	cp requirements-test.lock requirements.lock
	$(COMPILE) --extra lab --extra build --output-file requirements.lock

clean:
	rm -rf build dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

clean-all: clean
	rm -rf .venv
