# make run   trains the small network on the embedded digits      make test       every check and test
# make lint  style, format, types                                 make test-long  the tests that take minutes
# make clean removes what make made, except runs/                 make docs       checks the documents, builds their site
# make sanitize  looks for memory errors in the C++ kernels: tests and 100,000 random calls, 10 minutes (GCC, CMake)
#
# All of them create .venv first if need be. PYTHON chooses the interpreter; ARGS is passed on: make run ARGS="--epochs 2".
.PHONY: run test test-long lint docs sanitize clean
SHELL := /bin/sh
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# Installing again is only needed when what would be installed has changed, the C++ kernels included. An editable
# installation also remembers which modules there are.
NATIVE := $(sort $(wildcard $(addprefix src/san/ops/kernels/*/,*.cpp *.h CMakeLists.txt)))
KEY := $(shell (cat pyproject.toml constraints.txt $(NATIVE); find src/san -name '*.py' | sort) | cksum | cut -d' ' -f1)
TRAIN := .venv/.installed-train-$(KEY)
DEV := .venv/.installed-dev-$(KEY)
# --compile: importing uncompiled packages takes twice as long, each time.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --compile -c constraints.txt

# Those who develop want C++ that does not compile to be an error, not an installation without it.
test test-long lint docs: export SAN_REQUIRE_NATIVE ?= 1

run: $(TRAIN)
	$(BIN)/san train $(ARGS)

test: lint
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-long: $(DEV)
	$(BIN)/pytest -m long --timeout 3600 $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	SAN_SITE=build/site $(BIN)/pytest -q tests/test_documents.py tests/test_site.py tests/test_adding.py

# Python itself is not instrumented, so the sanitizers' library goes before it, and libstdc++ because that wraps it.
# Python never frees some of its memory, so leaks are not looked for. More threads than cores must not wait by spinning.
BEFORE = $(foreach name,libasan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))
SANITIZED = LD_PRELOAD='$(BEFORE)' ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_WAIT_POLICY=passive \
	UBSAN_OPTIONS=print_stacktrace=1 SAN_NATIVE_LIBRARY=build/sanitize/libsan_native.so

sanitize: $(DEV)
	cmake -S src/san/ops/kernels/native -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSAN_SANITIZE=ON
	cmake --build build/sanitize
	$(SANITIZED) $(BIN)/pytest -q tests/ops/test_backends.py -k native
	$(SANITIZED) $(BIN)/pytest -q tests/ops/test_native.py tests/ops/test_*_kernels.py tests/ops/test_recording.py tests/test_fused.py
	$(SANITIZED) $(BIN)/python tests/ops/fuzz_native.py $(ARGS)

$(TRAIN): | $(BIN)/python
	@echo "Installing SAN and what training needs into .venv (minutes the first time)"
	@$(INSTALL) -e '.[train]'
	@rm -f .venv/.installed-*
	@touch $@

$(DEV): | $(BIN)/python
	@echo "Installing SAN, training and test tools into .venv (minutes the first time)"
	@$(INSTALL) -e '.[train,export,demo,docs,dev]'
	@rm -f .venv/.installed-*
	@touch $(TRAIN) $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "SAN needs Python 3.11 or newer; choose one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
