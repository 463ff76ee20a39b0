PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint types contracts kernels parity bench soak clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(INSTALLED)            ## train, evaluate, fold and verify an SO(8) adapter on a small Phi-3
	$(BIN)/so8t demo

test: $(INSTALLED)            ## every test: behaviour, parity, Triton interpreter
	$(BIN)/python -m pytest -n 2 --dist loadgroup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m interpreter

lint: $(INSTALLED)            ## ruff
	$(BIN)/ruff check .

types: $(INSTALLED)           ## mypy
	$(BIN)/mypy

contracts: $(INSTALLED)       ## which room may import which
	$(BIN)/lint-imports

kernels: $(INSTALLED)         ## compile every Triton kernel for sm_80/86/89/90 without a GPU
	$(BIN)/so8t parity --kernels

parity: $(INSTALLED)          ## judge production against reference, write docs/numerics.md
	$(BIN)/so8t parity

bench: $(INSTALLED)           ## benchmarks beside peers; JSON and plots under docs/bench
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,bench]"
	failed=0; for claim in rotation train_step lns tensor_train linear_recurrence semiseparable tridiagonal \
		hebbian snr_filter resonance logits language_models step_loops; do $(BIN)/python -m benchmarks.$$claim || failed=1; done; exit $$failed

soak: $(INSTALLED)            ## hours of faults: kills, damages, broken numbers, disks, hostile files, drawn examples; a table
	$(BIN)/python -m tests.faults.soak

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
