# Every target sets up what it needs in a virtual environment of this directory; `make help` lists them.
#
# Variables (make test TORCH_SPEC='torch==2.11.*'):
#   ENV              an environment that is there, as its directory or its interpreter (make gpu-test ENV=python3): nothing is installed in it and no
#                    network is used. It must have torch, and should have ninja. CUDA kernels are built for the GPUs that are present.
#   PYTHON           the interpreter that the environment is made from
#   TORCH_SPEC       the torch for .venv; TORCH_INDEX: a package index to take it from, for example one of CPU builds
#   CUDA_TORCH_SPEC  the CUDA build of torch for .venv-cuda
#   ARGS             further arguments for the program that the target runs, for example ARGS='-k gradcheck' for pytest
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
CUDA_TORCH_SPEC ?= torch==2.14.1
ARGS ?=
ENV ?=

# timm and segmentation-models-pytorch need the torchvision of their torch. Installed without dependencies, so that torch stays what it is; beside
# another torch the tests of them are reported as not run.
TORCHVISION := $(if $(findstring 2.13.0,$(TORCH_SPEC)),torchvision==0.28.0,$(if $(findstring 2.14.1,$(TORCH_SPEC)),torchvision==0.29.1))
VISION := $(if $(TORCHVISION),$(TORCHVISION) timm==1.0.31 segmentation-models-pytorch==0.6.0)

# One stamp for each torch, so that another one installs and builds anew. The build in place is one, whichever environment it is for.
ifeq ($(ENV),)
PY := $(VENV)/bin/python
TAG := $(subst *,x,$(subst <,,$(subst >,,$(subst =,,$(TORCH_SPEC)))))
DEPS := $(VENV)/.deps-$(TAG)
else
PY := $(or $(wildcard $(ENV)/bin/python),$(ENV))
TAG := $(shell $(PY) tests/environment.py --tag)
DEPS := environment
export TORCH_CUDA_ARCH_LIST ?= native
endif
BUILT := build/.built-$(TAG)

CXX_SOURCES := $(shell find csrc -type f)
FORMATTED := $(shell find csrc tests examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
PY_TREES := $(wildcard setup.py build_extensions.py bce_ext tests benchmarks examples tools docs)
TYPED := $(wildcard bce_ext examples benchmarks tools)

.PHONY: help environment wheel release docs figures deps build demo test sanitize lint format bench bench-quick passes cuda-check gpu gpu-test gpu-bench nvcc FORCE clean distclean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

ifeq ($(ENV),)
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEPS): requirements-dev.txt | $(PY)
	rm -f $(VENV)/.deps-*
	$(PY) -m pip install --disable-pip-version-check $(TORCH_INDEX:%=--index-url %) '$(TORCH_SPEC)'
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	$(if $(VISION),$(PY) -m pip install --disable-pip-version-check --no-deps $(VISION))
	touch $@
$(BUILT): $(DEPS)
else
environment:
	@$(PY) tests/environment.py
$(BUILT): | $(DEPS)
endif

# The full log is in build/build.log; the terminal gets a line for each file.
$(BUILT): setup.py build_extensions.py pyproject.toml $(CXX_SOURCES)
	@mkdir -p build
	@rm -f build/.built-*
	$(PY) setup.py build_ext --inplace 2>&1 | tee build/build.log \
		| sed -uE 's|^(\[[0-9/]+\]) .* -c [^ ]*/(csrc/[^ ]+) .*|\1 \2|; s|^[^ ]*[gc]\+\+ .* -shared .* -o ([^ ]+).*|link \1|'
	$(if $(ENV),,$(PY) -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps --editable .)
	touch $@

deps: $(DEPS)  ## the environment without the extension
build: $(BUILT)  ## the extension, in place; only what changed is compiled

demo: $(BUILT)  ## trains real models with torch's loss and with ours, and compares
	$(PY) examples/demo.py $(ARGS)
	$(PY) examples/identifiers.py --files 700 --steps 60

test: $(BUILT)  ## the whole test suite
	$(PY) -m pytest tests $$($(PY) tests/environment.py --distribute) $(ARGS)

# Built in the tree, so that its objects serve; but from an empty directory of modules, and used from another place, in an environment of its own.
# The libraries of torch stay torch's.
WHEEL := build/wheel
SMOKE := tests/test_native_parity.py tests/test_override.py tests/test_torchscript.py
wheel: $(DEPS) $(VENV)/.release  ## dist/: the sdist and a wheel for this torch, checked and tried
	rm -rf $(WHEEL) build/lib.* dist
	$(PY) -m build --no-isolation --sdist
	BCE_EXT_RELEASE=1 $(PY) -m build --no-isolation --wheel --outdir $(WHEEL)
	PATH=$(abspath $(VENV)/bin):$$PATH $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcud*' --wheel-dir dist $(WHEEL)/*.whl
	$(PY) -m twine check --strict dist/*
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --disable-pip-version-check $(TORCH_INDEX:%=--extra-index-url %) '$(TORCH_SPEC)' dist/*.whl \
		hypothesis numpy pytest --constraint requirements-dev.txt
	mkdir $(WHEEL)/elsewhere && cp -r tests docs pyproject.toml $(WHEEL)/elsewhere
	cd $(WHEEL)/elsewhere && ../venv/bin/python -m bce_ext && ../venv/bin/python -m pytest $(SMOKE) $(ARGS)
	@ls -l dist

docs: $(BUILT) $(VENV)/.docs  ## the documentation, in docs/_build/html; a warning is an error
	$(PY) -m sphinx -W --keep-going -q -d build/doctrees docs docs/_build/html
	@echo "$(abspath docs/_build/html/index.html)"

figures: $(DEPS)  ## the drawings of the documentation
	$(PY) docs/images/call_to_kernel.py

$(VENV)/.release $(VENV)/.docs: $(VENV)/.%: requirements-%.txt | $(DEPS)
	$(PY) -m pip install --disable-pip-version-check -r $<
	touch $@

release:  ## cuts the changelog and sets the version: make release VERSION=0.2.0
	$(PYTHON) tools/release.py cut '$(VERSION)'

lint: $(DEPS)  ## formatting, style and types
	$(PY) -m ruff format --check $(PY_TREES)
	$(PY) -m ruff check $(PY_TREES)
	$(PY) -m mypy $(TYPED)
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

format: $(DEPS)  ## formats all sources
	$(PY) -m ruff format $(PY_TREES)
	$(PY) -m ruff check --fix $(PY_TREES)
	$(VENV)/bin/clang-format -i $(FORMATTED)

bench: $(BUILT)  ## the whole benchmark
	$(PY) benchmarks/benchmark.py $(ARGS)

passes: $(DEPS)  ## the passes over memory that torch's own loss takes
	$(PY) benchmarks/passes.py

bench-quick: $(BUILT)  ## the benchmark in under 3 minutes
	$(PY) benchmarks/benchmark.py --quick $(ARGS)

# Builds of another kind stand in a copy of the tree, so that none overwrites another. A copy keeps the time stamps and a build directory of
# its own: only what changed is compiled.
COPIED := $(wildcard Makefile *.md LICENSE MANIFEST.in setup.py build_extensions.py pyproject.toml $(wildcard requirements-*.txt) \
	.clang-format CITATION.cff .pre-commit-config.yaml bce_ext csrc tests benchmarks examples docs tools)
build/%-tree: FORCE
	@mkdir -p $@
	@find $@ \( -path $@/build -o -name '*.so' -o -name _build.py \) -prune -o -type f -exec rm {} +
	@tar -c --exclude='*.so' --exclude=_build.py --exclude=__pycache__ $(COPIED) | tar -x -C $@
FORCE:

CUDA_TREE := build/cuda-tree
IN_CUDA_TREE = env -u TORCH_INDEX BCE_EXT_FORCE_CUDA=1 $(MAKE) -C $(CUDA_TREE) VENV=$(abspath .venv-cuda) TORCH_SPEC='$(CUDA_TORCH_SPEC)' \
	TORCH_INDEX=
ifeq ($(ENV),)
WITH_CUDA = $(IN_CUDA_TREE)
CUDA_PY := .venv-cuda/bin/python
gpu gpu-test gpu-bench: $(CUDA_TREE)
else # the environment that is there is the one with CUDA
WITH_CUDA = BCE_EXT_FORCE_CUDA=1 $(MAKE)
CUDA_PY := $(PY)
endif

nvcc:
	@command -v nvcc "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" > /dev/null \
		|| { echo "The CUDA build needs nvcc, and there is none on PATH, in CUDA_HOME or in /usr/local/cuda."; exit 1; }

cuda-check: nvcc $(CUDA_TREE)  ## builds with CUDA (no GPU needed), inspects the machine code, runs the whole test suite on that build
	env -u TORCH_CUDA_ARCH_LIST $(IN_CUDA_TREE) build
	cd $(CUDA_TREE) && $(abspath .venv-cuda)/bin/python tests/cuda/check_cubins.py
	$(IN_CUDA_TREE) test

# Every operator with hostile arguments. The extension's own code is instrumented; torch's is not, but its memory is
# watched through malloc. Off is what is no error or makes the build slow: vptr needs type information that hidden
# symbols do not have, and use after scope would be tracked for each of the kernel's thousands of temporaries.
# python has no sanitizers, so their libraries are loaded before it, and libstdc++ with them, whose exceptions they watch.
# On 2 cores the build takes some 4 minutes and FUZZ_CASES some 3; ARGS="--cases 200000" runs more.
FUZZ_CASES := 25000
SANITIZE_TREE := build/sanitize-tree
SANITIZERS := -fsanitize=address,undefined -fno-sanitize=vptr
SANITIZE_FLAGS := -O1 -g1 -fno-omit-frame-pointer $(SANITIZERS) -fno-sanitize-address-use-after-scope -fno-sanitize-recover=undefined
IN_SANITIZED = env LD_PRELOAD="$(foreach lib,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))" \
	ASAN_OPTIONS=detect_leaks=0:symbolize=0:allocator_may_return_null=1:max_allocation_size_mb=2048 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:symbolize=0 \
	PYTHONPATH=$(abspath $(SANITIZE_TREE)):$(abspath $(SANITIZE_TREE))/tests

sanitize: $(DEPS) $(SANITIZE_TREE)  ## every operator with hostile arguments, under AddressSanitizer and UndefinedBehaviorSanitizer
	cd $(SANITIZE_TREE) && mkdir -p build && BCE_EXT_FORCE_CUDA=0 BCE_EXT_CXX_FLAGS='$(SANITIZE_FLAGS)' BCE_EXT_LINK_FLAGS='$(SANITIZERS)' \
		$(abspath $(PY)) setup.py build_ext --inplace > build/build.log 2>&1 || { tail -30 build/build.log; exit 1; }
	cd $(SANITIZE_TREE) && $(IN_SANITIZED) $(abspath $(PY)) -m fuzz --expect-sanitizers --cases $(FUZZ_CASES) $(ARGS)

gpu-test: nvcc gpu  ## the tests that need a GPU
	$(WITH_CUDA) test ARGS="-m gpu $(ARGS)"

gpu-bench: nvcc gpu  ## the benchmark on a GPU
	$(WITH_CUDA) bench ARGS="--device cuda $(ARGS)"

gpu: nvcc
	@$(WITH_CUDA) --silent deps
	@$(CUDA_PY) -c 'import torch; raise SystemExit(not torch.cuda.is_available())' \
		|| { echo "This target needs a GPU, and torch sees none."; exit 1; }

clean:  ## removes what was built
	rm -rf build dist docs/_build *.egg-info bce_ext/*.so bce_ext/_build.py
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find bce_ext tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2> /dev/null || true

distclean: clean  ## and the environments
	rm -rf .venv .venv-cuda
