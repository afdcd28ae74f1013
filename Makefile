# Two commands for a fresh machine: each makes .venv, installs what it needs, and runs. PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check

LAUNCH := $(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml

demo: .venv/installed
	$(LAUNCH) train/distill.py
	$(LAUNCH) train/probe.py
	$(LAUNCH) eval/shifts.py
	$(BIN)/python eval/report.py

# A worker for each CPU, each with about 1 GB, and one more, as some tests mostly wait. Compiled modules are kept, also
# where an image says not to: each worker and each script that a test starts would compile them all again.
test: check
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(expr $$(nproc) + 1) --maxprocesses 8 --dist worksteal tests

check: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

.venv/installed: requirements.txt
	@echo "installing into .venv: some minutes, about 5 GB with CUDA's libraries"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/tested: .venv/installed tests/requirements.txt
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@
