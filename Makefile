# `make demo` and `make test` are all a newcomer needs; each installs what it needs into .venv first.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.9.0
# The older of the two versions that every kernel must compile with, in a folder of its own: what torch 2.11 comes with.
TRITON_OLD ?= triton==3.6.0
BIN    := $(VENV)/bin
SEED   ?= 0
ARGS   ?=
COUNT  ?= 1000000
STAMP  := $(VENV)/.installed
OLDER  := .cache/$(subst ==,-,$(TRITON_OLD))
VLLM_VENV  ?= .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
PEERS_VENV  ?= .venv-peers
PEERS_STAMP := $(PEERS_VENV)/.installed
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu) CMakeLists.txt setup.py pyproject.toml

COMPILE_CHECK := $(BIN)/python kernels/compile_check.py --also $(OLDER)
PYTEST := $(BIN)/python -m pytest -q -m "not gpu and not slow"

.PHONY: help dev demo test check chaos compile-check fuzz sanitize sim wheel-check bench clean vllm-dev test-vllm peers-dev
.DEFAULT_GOAL := help

help:
	@echo "make demo      install, build, make a tiny base model, train it asynchronously, print the result"
	@echo "make test      install, build, run the tests"
	@echo "make check     ruff, ruff format, mypy --strict, kernel compile check, tests: what a commit needs"
	@echo "make fuzz      mutated frames through the broker's checks; COUNT=$(COUNT) SEED=$(SEED)"
	@echo "make chaos     kill -9, SIGSTOP, a lying network and a full disk on real processes, in ten minutes or so"
	@echo "make compile-check  every GPU kernel to Hopper machine code with two Tritons and nvcc; a spill fails"
	@echo "make vllm-dev  vLLM for CPUs into .venv-vllm (3.5 GB; a few minutes, once)"
	@echo "make test-vllm install that, run the engine tests on both engines"
	@echo "make peers-dev TRL for CPUs into .venv-peers, for python -m benchmarks.run peers"
	@echo "make sanitize  C++ under address, undefined-behaviour and thread sanitizers"
	@echo "make wheel-check    build a wheel (under 60 s), install it into an empty environment, use it"
	@echo "make sim       the ledger in 1,000 simulated histories with faults, and with 10,000 generators"
	@echo "make bench     CPU benchmarks, results into benchmarks/results/"

dev: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25"
	$(BIN)/python -m pip install -q $(TORCH) "setuptools>=77" wheel "pybind11>=3.0"
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps $(TRITON)  # interpreted and compiled by the tests; needs no CUDA torch
	touch $@

demo: dev
	$(BIN)/orz demo --seed $(SEED) $(ARGS)

test: dev
	$(PYTEST) $(ARGS)

$(OLDER)/.installed: | $(STAMP)
	rm -rf $(OLDER)
	$(BIN)/python -m pip install -q --no-deps --target $(OLDER) $(TRITON_OLD)
	touch $@

check: dev $(OLDER)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(COMPILE_CHECK)
	$(PYTEST) $(ARGS)
	$(MAKE) test-vllm

vllm-dev: $(VLLM_STAMP)

# The order matters: torch first, so that nothing brings another one; then all that vLLM needs but what would break
# transformers; then vLLM without its requirements; then this package, whose entry point vLLM's processes look for.
$(VLLM_STAMP): .ci/vllm-requirements.txt .ci/vllm-wheel.txt pyproject.toml setup.py
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install -q --upgrade "pip>=25"
	$(VLLM_BIN)/python -m pip install -q $(TORCH)
	$(VLLM_BIN)/python -m pip install -q $(TORCH) -r .ci/vllm-requirements.txt "tyro>=1.0" "rich>=14" \
		"math-verify>=0.9,<0.10" "matplotlib>=3.9" "pytest>=9" "pytest-timeout>=2.4" "pybind11>=3.0" wheel
	$(VLLM_BIN)/python -m pip install -q --no-deps --require-hashes -r .ci/vllm-wheel.txt
	$(VLLM_BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

peers-dev: $(PEERS_STAMP)

# The benchmark runs from here, so this package is not installed into it.
$(PEERS_STAMP): benchmarks/peers-requirements.txt
	test -x $(PEERS_VENV)/bin/python || $(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install -q --upgrade "pip>=25"
	$(PEERS_VENV)/bin/python -m pip install -q $(TORCH)
	$(PEERS_VENV)/bin/python -m pip install -q $(TORCH) -r benchmarks/peers-requirements.txt
	touch $@

# `timeout`: an engine that hangs must not hang a commit.
test-vllm: vllm-dev
	timeout -k 10 900 $(VLLM_BIN)/python -m pytest -q -W ignore::ResourceWarning \
		-W ignore::pytest.PytestUnraisableExceptionWarning tests/engines $(ARGS)

fuzz: dev
	$(BIN)/python -m tests.fuzz_wire $(COUNT) --seed $(SEED)

compile-check: dev $(OLDER)/.installed
	$(COMPILE_CHECK) $(ARGS)

chaos: dev
	$(BIN)/python -m tests.chaos.saves --kills 100
	$(BIN)/python -m tests.chaos.run $(ARGS)

sanitize: dev
	bash csrc/sanitize.sh $(abspath $(BIN)/python)

wheel-check: dev
	$(BIN)/python -m pytest -q -s -m slow tests/ops/test_wheel.py

sim: dev
	$(BIN)/orz sim --seeds 1000 $(ARGS)
	$(BIN)/orz sim --scale

bench: dev
	$(BIN)/python -m benchmarks.run cpu $(ARGS)

clean:
	rm -rf build dist *.egg-info $(VENV)/.installed
