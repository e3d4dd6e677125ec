# make setup | demo | test | lint | bench; everything else follows from these.
# A step of the set-up leaves its stamp only when it succeeded, so an interrupted set-up goes on where it stopped.

PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
ORT_VENV := .venv-ort-training
# An index with PyTorch's CPU build, where pip's own has none: PyTorch's installation page names it.
TORCH_INDEX ?=
TORCH := 2.13.0
PYTHON_DEVICE ?= python3.13
# One for each Python that is asked for.
DEVICE_VENV := .venv-device-$(subst /,-,$(PYTHON_DEVICE))
DEVICE_EXTRAS := onnxruntime,plots,images,heic,device,discovery,coordinator,completion,uvloop,s3,postgresql
EXTRAS := $(DEVICE_EXTRAS),executorch,export,dev
WORKERS ?= 2
PYTEST := $(PY) -m pytest -n $(WORKERS)
BENCH_OPTIONS ?= --students cnn3 --batches 32 --threads 1 --steps 40
NATIVE_SOURCES := $(wildcard edge_runtime/native/*.cpp edge_runtime/native/*.h edge_runtime/native/library/*) \
  edge_runtime/native/build.py edge_runtime/native/architecture.py edge_runtime/native/compile.py

.DELETE_ON_ERROR:
ENGINE ?= onnxruntime
KINDS ?= built-in,published,layer
MINUTES ?= 60
PLATFORMS := $(foreach libc,manylinux_2_17 musllinux_1_1,$(addprefix $(libc)_,x86_64 aarch64))
QUICK_OUTPUT := build/reproduce-quick
EXPERIMENTS := methods heterogeneity scarcity latent-size federation poisoning privacy

.PHONY: help setup ray check-machine demo demo-seeds test test-tiny test-unit test-contract test-device test-long lint bench networks wheels \
  digests fuzz reproduce-quick results performance clean

help:
	@echo "make setup      creates $(VENV) and $(ORT_VENV) with pinned packages, builds the native runner; about 0.8 GB"
	@echo "                to download with PyTorch's CPU build, 2.9 GB without; TORCH_INDEX=... names an index that has it"
	@echo 'make demo       sets up and runs the main job'
	@echo 'make demo-seeds its federation for ten seeds, with and without transfer labels; goes on where it stopped'
	@echo 'make test       lint and all tests under 15 minutes; also test-tiny, test-unit, test-contract, test-long'
	@echo 'make test-device   tests of devices and coordinator without PyTorch on another Python; PYTHON_DEVICE=... (now $(PYTHON_DEVICE))'
	@echo 'make lint       ruff'
	@echo 'make bench      measures the training step on every engine; writes benchmarks/results/'
	@echo 'make networks   exports, verifies and times every network of the corpus; ENGINE=..., KINDS=...; goes on where it stopped'
	@echo 'make wheels     wheels for x86-64 and 64-bit ARM, each with libedgestill for both, and the source distribution; in dist/'
	@echo 'make digests    the state of every student after 200 steps here and on 64-bit ARM (qemu-user)'
	@echo 'make fuzz       libedgestill under libFuzzer (clang 18 or newer); MINUTES=... (now $(MINUTES))'
	@echo 'make reproduce-quick   every experiment in its quick version, from nothing; their figures mean nothing'
	@echo 'make results    fills docs/results.md from the committed records'
	@echo 'make performance   fills docs/performance.md and README from the committed records of bench step'
	@echo 'make clean      removes both environments and what was built'
	@echo 'PYTHON=...      the Python 3.11 to use (now $(PYTHON)); WORKERS=... test processes (now $(WORKERS))'

setup: $(STAMPS)/packages $(STAMPS)/native $(ORT_VENV)/.stamp

check-machine:
	@command -v '$(PYTHON)' >/dev/null || { \
	  echo 'error: $(PYTHON) not found. Install Python 3.11 (Debian: apt install python3.11 python3.11-venv) or' \
	       'name one: make setup PYTHON=/path/to/python3.11' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "error: $(PYTHON) is $$('$(PYTHON)' --version 2>&1), edgestill is pinned to Python 3.11." \
	       'Name one: make setup PYTHON=/path/to/python3.11' >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'error: $(PYTHON) cannot create environments. Debian: apt install python3.11-venv' >&2; exit 1; }
	@command -v '$(firstword $(CXX))' >/dev/null || { \
	  echo 'error: no C++ compiler ($(CXX)). Install one (Debian: apt install g++) or name one: make setup CXX=...' \
	       >&2; exit 1; }

TORCH_FROM = $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)')

# The order-only prerequisite keeps a check that always runs from making the environment anew.
$(STAMPS)/venv: | check-machine
	'$(PYTHON)' -m venv $(VENV) || { \
	  echo 'error: $(VENV) cannot be made; if another Python made it before, run `make clean` first' >&2; exit 1; }
	mkdir -p $(STAMPS)
	touch $@

# First and alone: asked for together with packages that name it in looser terms, pip does not find the CPU build.
# Its dependencies come with the other packages, so the index need not have them.
$(STAMPS)/torch: $(STAMPS)/venv
	@if $(PIP) index versions torch $(TORCH_FROM) 2>/dev/null | grep -q '[ ,]$(TORCH)+cpu'; then \
	  echo "PyTorch's CPU build is there: make setup downloads about 0.8 GB and takes 3.5 GB of disk"; \
	elif [ -n '$(TORCH_INDEX)' ]; then \
	  echo 'error: $(TORCH_INDEX) has no CPU build of PyTorch $(TORCH). Name another index: make setup TORCH_INDEX=...,' \
	       "or use pip's own: make setup TORCH_INDEX=" >&2; exit 1; \
	else \
	  echo "pip's index has no CPU build of PyTorch $(TORCH): make setup downloads about 2.9 GB and takes 7 GB of disk."; \
	  echo '0.8 GB and 3.5 GB with an index that has it: make setup TORCH_INDEX=... (see README)'; \
	fi
	$(PIP) install --no-deps $(TORCH_FROM) torch==$(TORCH)
	touch $@

# The build backend is pinned too, so it is installed first and used without isolation.
$(STAMPS)/packages: constraints.txt pyproject.toml Makefile $(STAMPS)/torch
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	# It declares an older attrs than the exporter of ExecuTorch needs, and works with the newer one.
	$(PIP) install -c constraints.txt --no-deps dp-accounting absl-py
	touch $@

# What only the simulator's tests on a cluster need.
ray: $(STAMPS)/ray

$(STAMPS)/ray: constraints.txt pyproject.toml $(STAMPS)/packages
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[ray]'
	touch $@

$(STAMPS)/native: $(NATIVE_SOURCES) $(STAMPS)/packages
	CXX='$(CXX)' $(PY) -m edgestill.runtime.native.build
	$(PY) -m edgestill.runtime.native.compile
	touch $@

# onnxruntime-training installs into the import package `onnxruntime`, so it lives in an environment of its own.
$(ORT_VENV)/.stamp: constraints-ort-training.txt | check-machine
	'$(PYTHON)' -m venv $(ORT_VENV)
	$(ORT_VENV)/bin/python -m pip --disable-pip-version-check install -r constraints-ort-training.txt
	touch $@

# What devices and coordinator need, on another Python, and what their tests need; no PyTorch.
$(DEVICE_VENV)/.stamp: constraints.txt pyproject.toml
	'$(PYTHON_DEVICE)' -m venv --clear $(DEVICE_VENV)
	$(DEVICE_VENV)/bin/python -m pip --disable-pip-version-check install -c constraints.txt setuptools
	$(DEVICE_VENV)/bin/python -m pip --disable-pip-version-check install -c constraints.txt --no-build-isolation \
	  -e '.[$(DEVICE_EXTRAS),dev]' onnx attrs mpmath scipy
	$(DEVICE_VENV)/bin/python -m pip --disable-pip-version-check install -c constraints.txt --no-deps dp-accounting absl-py
	touch $@

demo: setup
	$(VENV)/bin/edgestill demo --export

# About an hour; a line a run in benchmarks/results/demo-seeds.jsonl, of which the demo shows those of its seed.
demo-seeds: setup
	$(PY) -m edgestill.benchmarks.demo_seeds

lint: $(STAMPS)/packages
	$(PY) -m ruff check .

test: setup lint
	$(PYTEST) -m 'not long and not device'

test-tiny test-unit test-contract: test-%: setup
	$(PYTEST) -m $*

test-device: $(STAMPS)/native $(DEVICE_VENV)/.stamp
	$(PY) -m edgestill.simulation.demo_bundles
	$(DEVICE_VENV)/bin/python -m pytest -n $(WORKERS) -m 'not long and not device' tests/runtime tests/coordinator \
	  tests/simulation

test-long: setup
	$(PYTEST) -m long --timeout 3600

bench: setup
	mkdir -p benchmarks/results
	$(VENV)/bin/edgestill bench step $(BENCH_OPTIONS) --output benchmarks/results --plot benchmarks/results/step.png

# A file an engine; thousands of seconds for onnxruntime, hours for executorch.
networks: setup
	mkdir -p benchmarks/results/networks
	$(PY) -m tests.support.networks.measure --engine $(ENGINE) --kinds $(KINDS) \
	  --output benchmarks/results/networks/$(ENGINE).jsonl

# The library has no libc, so one wheel would do; the tags say what it was made for. `pip wheel .` makes one without.
wheels: $(STAMPS)/packages
	rm -rf build/lib build/bdist.*
	$(PY) -m edgestill.simulation.demo_bundles
	for platform in $(PLATFORMS); do \
	  $(PIP) wheel -q --no-deps --no-build-isolation -w dist \
	    --config-settings=--build-option=--plat-name=$$platform . || exit 1; \
	done
	$(PY) -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' > /dev/null
	ls -l dist

digests: setup
	$(PY) -m tests.support.native.digests --output benchmarks/results

# Finds go to build/fuzz/crashes, the corpus stays for the next time.
fuzz: setup
	$(PY) -m tests.support.native.fuzz --minutes $(MINUTES)

# One after another: each uses every core.
reproduce-quick: setup
	rm -rf $(QUICK_OUTPUT)
	for experiment in $(EXPERIMENTS); do \
	  $(VENV)/bin/edgestill reproduce $$experiment --quick --output $(QUICK_OUTPUT) > /dev/null || exit 1; \
	done

results: setup
	$(PY) -m edgestill.benchmarks.results_page

performance: setup
	$(PY) -m edgestill.benchmarks.performance_page

clean:
	rm -rf $(VENV) $(ORT_VENV) .venv-device* build *.egg-info
	rm -f edge_runtime/native/*.so
