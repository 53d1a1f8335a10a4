# `make demo` makes a video, `make test` checks everything; both start from nothing but Python 3.11 or later.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where no NVIDIA driver is found the pinned CPU build of torch is enough; constraints.txt keeps every version the same.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Other versions of Triton that the 8-bit kernels are held to, each in a folder of its own; about 1.7 GB.
OTHER_TRITON := 3.6.0 3.9.0
# The newest diffusers that pipelines are accelerated under, beside the one of constraints.txt; 62 MB.
NEWEST_DIFFUSERS := 0.42.1

.PHONY: demo test check lint types bench sanitize triton-versions diffusers-newest fetch-diffusers clean

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

# The C++ extension's own tests on a build of it that stops at the first bad address, overflow or misaligned access.
# libstdc++ goes with the sanitizer's library, which else does not know how it throws.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1

sanitize: $(VENV)/.dev
	$(PIP) 'setuptools>=77' 'pybind11>=2.13'
	rm -rf .sanitize && mkdir .sanitize
	cp -rs $(CURDIR)/wanfast .sanitize/wanfast
	rm -f .sanitize/wanfast/_C.*.so
	ln -sfn $(CURDIR)/kernels .sanitize/wanfast/kernels
	CC=g++ CXX=g++ CFLAGS="$(SANITIZERS)" $(BIN)/python setup.py -q build_ext --build-lib .sanitize --build-temp .sanitize/objects
	ls .sanitize/wanfast/_C.*.so
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/.sanitize \
	$(BIN)/pytest -q --capture=sys -p no:cacheprovider tests/test_csrc.py tests/test_csrc_forms.py tests/test_csrc_winograd.py tests/vae/test_conv.py

triton-versions: $(OTHER_TRITON:%=.triton/%)

.triton/%: | $(VENV)/bin/python
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==$*
	mv $@.part $@

# It takes what constraints.txt pins: only diffusers itself is another.
diffusers-newest: fetch-diffusers $(VENV)/.dev
	$(BIN)/pytest tests/test_diffusers_newest.py

fetch-diffusers: .diffusers/$(NEWEST_DIFFUSERS)

.diffusers/%: | $(VENV)/bin/python
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part diffusers==$*
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
	rm -rf $(VENV) .triton .diffusers .typecheck .sanitize build *.egg-info .pytest_cache .mypy_cache .ruff_cache
