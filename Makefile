# `make demo` makes a video, `make test` checks everything; both start from nothing but Python 3.11 or later.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where no NVIDIA driver is found the pinned CPU build of torch is enough; constraints.txt keeps every version the same.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Other versions of Triton that the 8-bit kernels are held to, each in a folder of its own; about 1.7 GB.
OTHER_TRITON := 3.6.0 3.9.0

.PHONY: demo test check lint types bench triton-versions clean

demo: $(VENV)/.user
	@$(BIN)/wanfast generate "a red circle moves left" --seed 0 --output demo.mp4 --overwrite

test: check
	$(BIN)/pytest

check: lint types

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow package_dir, so it is shown the installed shape (docs/adr/0001).
types: $(VENV)/.dev
	rm -rf .typecheck && mkdir .typecheck
	cp -rs $(CURDIR)/wanfast .typecheck/wanfast
	ln -s $(CURDIR)/kernels .typecheck/wanfast/kernels
	cp pyproject.toml .typecheck/
	cd .typecheck && $(abspath $(BIN))/python -m mypy -p wanfast

bench: $(VENV)/.dev
	$(BIN)/pytest benchmarks

triton-versions: $(OTHER_TRITON:%=.triton/%)

.triton/%: | $(VENV)/bin/python
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==$*
	mv $@.part $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: setup.py pyproject.toml constraints.txt $(wildcard csrc/*) | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: setup.py pyproject.toml constraints.txt $(wildcard csrc/*) | $(VENV)/bin/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.user

clean:
	rm -rf $(VENV) .triton .typecheck build *.egg-info .pytest_cache .mypy_cache .ruff_cache
