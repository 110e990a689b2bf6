# Everything runs in .venv, which the first target that needs it makes; stamps in it keep a second `make` from
# repeating any set-up. PYTHON is the interpreter behind it, TORCH what pip is asked for: the CPU build is all that is
# needed, so where plain pip would bring CUDA along, add the index of CPU builds that PyTorch's install page names:
#     make test TORCH="torch==2.13.0 --index-url <that index>"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
CMAKE := $(VENV)/bin/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja
export KDFAST_BUILD_EXT ?= 1
export KDFAST_STRICT ?= 1

CSRC := $(shell find csrc -type f)
CPP = $(shell find csrc tests tools benchmarks -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' \
    -o -name '*.cuh')
PYTHON_FILES := $(wildcard setup.py kdfast tests tools benchmarks examples)
BUILT := $(VENV)/.built

.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help build demo test test-full versions torch-versions integration-test emulator-test mutants bench gpu-smoke gpu-check .gpu-build .gpu-smoke \
    .gpu-check cuda-check .cuda-check lint format docs sanitize wheels build-check hub-check arm-check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

# -- set-up ------------------------------------------------------------------------------------------------------------

# By itself: an index that TORCH names need not have the other packages.
$(VENV)/.torch:
	@echo "setting up $(VENV) with $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) numpy "setuptools>=77" cmake ninja
	@touch $@

# An extra of pyproject.toml, and kdfast itself, editable and not yet compiled. Torch and Triton stay as they are: an
# extra that asks for others is an error.
$(VENV)/.extra-%: $(VENV)/.torch pyproject.toml
	$(PY) -m pip list --format=freeze | grep -iE '^(torch|[a-z-]*triton[a-z-]*)==' > $(VENV)/constraints.txt
	KDFAST_BUILD_EXT=0 $(PIP) --constraint $(VENV)/constraints.txt --no-build-isolation -e '.[$*]'
	@touch $@

# Triton where torch did not bring it, which the CPU builds do not: the one that torch 2.13.0 is made for. No extra asks
# for it: pip would put it in place of torch's own, CUDA's or ROCm's, and then bring another torch that goes with it.
$(VENV)/.triton: $(VENV)/.torch
	$(PY) -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("triton"))' || $(PIP) triton==3.7.1
	@touch $@

$(VENV)/.extra-test: $(VENV)/.triton

# Without what it depends on: its torch and triton would replace those of a ROCm build.
$(VENV)/.liger: $(VENV)/.torch
	$(PIP) --no-deps liger-kernel
	@touch $@

# The trainers that kdfast.integrations is tested in, pinned, beside the same torch.
TRAINERS := .venv-integrations
$(TRAINERS)/.installed: $(wildcard tests/integrations/*.txt)
	$(PYTHON) -m venv $(TRAINERS)
	$(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check "torch==$$($(TRAINERS)/bin/python -c \
	    'import importlib.metadata as m; print(m.version("torch"))')" -r tests/integrations/requirements.txt \
	    --constraint tests/integrations/constraints.txt
	$(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/integrations/trainers.txt
	@touch $@

$(BUILT): $(VENV)/.torch setup.py CMakeLists.txt $(CSRC)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# -- what there is to do -----------------------------------------------------------------------------------------------

build: $(BUILT) ## compile the C++ operators into kdfast/

demo: $(BUILT) $(VENV)/.extra-demo ## distill a small network from a large one on real images, with a table and a picture
	$(PY) examples/distill_digits.py

# What tests run CUDA's kernels with: their PTX and their launchers, compiled for the host. Where there is no nvcc, nothing.
EMULATED := $(VENV)/.emulated
$(EMULATED): $(BUILT) $(VENV)/.extra-test $(CSRC) tests/emulated.py $(wildcard tests/cpp/*)
	cd tests && PYTHONPATH=.. ../$(PY) -c 'import emulated; emulated.why_not() or emulated.compiled()'
	@touch $@

# The suite's own report says how long a test took: a promise that takes long asks for a cheaper proof.
PYTEST := $(PY) -m pytest -n auto --dist worksteal
test: $(EMULATED) $(VENV)/.extra-demo ## every promise on every backend at least once
	$(PYTEST) $(ARGS)

test-full: $(EMULATED) $(VENV)/.extra-demo ## the whole list of calls on every backend, both architectures of GPUs
	$(PYTEST) --full $(ARGS)

# Each Triton in a venv of its own, beside .venv's torch. The first is the least that choice.py takes.
TRITONS ?= 3.7.0 3.7.1 3.8.0 3.9.0
SITE = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
versions: $(VENV)/.extra-test ## four calls compiled and run by each Triton from the least to the newest
	@failed=; for version in $(TRITONS); do \
	    home=build/versions/$$version; python=$$home/bin/python; \
	    test -x $$python || $(PYTHON) -m venv $$home || exit 1; \
	    $$python -m pip install --quiet --disable-pip-version-check triton==$$version || exit 1; \
	    echo $(SITE) > $$(echo $$home/lib/python*/site-packages)/torch.pth; \
	    echo "Triton $$version"; \
	    PYTHONPATH=$(CURDIR) $$python -m pytest -q -p no:cacheprovider tests/test_triton_launches.py -k four_kinds \
	        || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "failed with Triton$$failed"; exit 1; }

# The CPU library as .venv's torch built it, loaded and run by the oldest torch that pyproject.toml takes, and by newer
# ones, each in a venv of its own. What pip finds of these are builds for CUDA, of 3 to 6 GB.
TORCHES ?= 2.10.0 2.14.1
RUN_BY_TORCHES := tests/test_limits.py tests/test_autograd.py tests/test_transforms.py tests/test_operator_autograd.py
torch-versions: $(BUILT) ## the built CPU operators under the oldest torch and a newer one
	@failed=; for version in $(TORCHES); do \
	    home=build/versions/torch-$$version; python=$$home/bin/python; \
	    test -x $$python || $(PYTHON) -m venv $$home || exit 1; \
	    $$python -m pip install --quiet --disable-pip-version-check torch==$$version numpy pytest hypothesis || exit 1; \
	    echo "torch $$version"; \
	    PYTHONPATH=$(CURDIR) $$python -m pytest -q -p no:cacheprovider $(RUN_BY_TORCHES) -k 'cpu and not triton and not cuda' \
	        || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "failed with torch$$failed"; exit 1; }

integration-test: $(BUILT) $(TRAINERS)/.installed ## kdfast.integrations in each trainer, beside its own loss
	PYTHONPATH=$(CURDIR) $(TRAINERS)/bin/python -m pytest -p no:cacheprovider --confcutdir tests/integrations \
	    tests/integrations $(ARGS)

emulator-test: $(VENV)/.extra-test ## the own tests of the emulator that runs GPU kernels on the CPU, tools/ptxemu
	PTXEMU_CACHE=$(CURDIR)/build/ptxemu $(PY) -m pytest tools/ptxemu/tests $(ARGS)

mutants: $(BUILT) $(VENV)/.extra-test $(VENV)/.extra-demo ## what the tests miss of the faults in tests/planted; takes hours, ARGS=--help
	$(PY) tests/mutants.py $(ARGS)

bench: $(BUILT) $(VENV)/.extra-demo ## kdfast beside its peers: table, CSV and picture; ARGS=--quick takes a minute
	$(PY) -m benchmarks $(ARGS)

# NVIDIA's checker of memory accesses, of races in shared memory and of barriers, on a call of each kind of kernel. It is
# often not on PATH, but lies beside nvcc. Without PyTorch's cache each tensor is an allocation whose ends are checked;
# PyTorch's own kernels are not; and a question that the driver answers with an error is none of a kernel's.
CUDA_FOLDERS = $(CUDA_HOME) $(CUDA_PATH) $(patsubst %/bin/,%,$(dir $(realpath $(shell command -v nvcc 2> /dev/null)))) /usr/local/cuda
SANITIZER = $(firstword $(shell command -v compute-sanitizer 2> /dev/null) $(wildcard $(foreach folder,$(CUDA_FOLDERS),\
    $(folder)/bin/compute-sanitizer $(folder)/compute-sanitizer/compute-sanitizer)))
SANITIZED = if [ -x "$(SANITIZER)" ]; then status=0; for tool in memcheck racecheck synccheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --report-api-errors no --error-exitcode 1 \
	        --kernel-name-exclude kns=at6native $(PY) tests/some_calls.py || status=1; \
	    done; exit $$status; \
	else echo "**** compute-sanitizer is NOT INSTALLED: nothing looked for bad accesses and races on this device ****"; fi

# The tests of what runs on the device. After a bad access nothing in that process means anything, hence -x.
KERNEL_TESTS = status=0; for backend in cuda triton; do \
	    $(PY) -m pytest -x --only-backend $$backend || status=1; \
	done; exit $$status

# What a step prints goes into build/gpu-<step>.txt too: a step that fails stops no other one, and fails the target at last.
record = { ( $2 ); echo $$? > build/gpu-$1.status; } 2>&1 | tee build/gpu-$1.txt

# In .venv-gpu, whose torch is GPU_TORCH: what pip finds by itself is the CUDA build, and for ROCm one adds the index
# that PyTorch's install page names, as with TORCH. Another nvcc than ours may spill a register: that stops nothing.
GPU_TORCH ?= torch
GPU_PROCESSES ?= 4
ON_GPU = VENV=.venv-gpu TORCH="$(GPU_TORCH)" KDFAST_STRICT=0
DRY := $(filter --dry-run,$(ARGS))
DRY_NEEDS := $(BUILT) $(VENV)/.extra-demo $(VENV)/.triton
gpu-smoke: ## a minute on a GPU: three shapes on each GPU backend against the reference
	$(MAKE) $(ON_GPU) .gpu-smoke

gpu-check: $(if $(DRY),$(DRY_NEEDS)) ## tests and a report of speed on a GPU; ARGS=--dry-run tries the report without one
	$(if $(DRY),$(PY) -m benchmarks $(ARGS),$(MAKE) $(ON_GPU) .gpu-check)

.gpu-build: $(VENV)/.torch
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu-check: torch sees no GPU here")'
	KDFAST_CUDA=$$($(PY) -c 'import torch; print(int(torch.version.cuda is not None))') $(MAKE) $(BUILT)

.gpu-smoke: .gpu-build
	PYTHONPATH=$(CURDIR) $(PY) tests/gpu_smoke.py

# What tells most comes first.
.gpu-check: .gpu-smoke $(VENV)/.extra-test $(VENV)/.extra-demo $(VENV)/.liger
	@mkdir -p build
	$(call record,sanitizer,$(SANITIZED))
	$(call record,kernels,$(KERNEL_TESTS))
	$(call record,tests,$(PY) -m pytest -n $(GPU_PROCESSES) --dist worksteal)
	$(call record,report,$(PY) -m benchmarks --device cuda --tests build/gpu-tests.txt --sanitizer build/gpu-sanitizer.txt $(ARGS))
	$(call record,linear,$(PY) -m benchmarks.linear --device cuda --dtype bf16 --rows 8192 --hidden 4096 4096 --vocab 151936)
	@exit $$(cat $(patsubst %,build/gpu-%.status,sanitizer kernels tests report linear) | sort -n | tail -1)

lint: $(VENV)/.extra-lint ## ruff, clang-format, mypy
	$(VENV)/bin/ruff check $(PYTHON_FILES)
	$(VENV)/bin/ruff format --check $(PYTHON_FILES)
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(VENV)/bin/mypy

format: $(VENV)/.extra-lint ## rewrite the sources as lint wants them
	$(VENV)/bin/ruff check --fix $(PYTHON_FILES)
	$(VENV)/bin/ruff format $(PYTHON_FILES)
	$(VENV)/bin/clang-format -i $(CPP)

docs: $(VENV)/.extra-docs ## the site, in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# The CUDA kernels against a torch that is built with CUDA, in .venv-cuda: compiled, loaded, registered, and by their own
# account usable but for the device, of which there need be none.
CUDA_TORCH ?= torch==2.14.1
cuda-check: ## the CUDA kernels built with a CUDA build of torch (5.5 GB) and loaded; no GPU needed
	$(MAKE) VENV=.venv-cuda TORCH="$(CUDA_TORCH)" .cuda-check

.cuda-check: $(BUILT)
	PYTHONPATH=$(CURDIR) $(PY) tests/cuda_check.py

# A second package in build/sanitize, with the tests beside it. libstdc++ is preloaded too: without it the sanitizer
# finds no __cxa_throw in a Python that is not linked to it.
SANITIZE_ENV = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)"
sanitize: $(VENV)/.extra-test ## the suite over C++ built with ASan and UBSan (GCC)
	rm -rf build/sanitize
	CXX=g++ KDFAST_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-lib build/sanitize
	cp -R $(wildcard tests tools benchmarks examples pyproject.toml) build/sanitize
	cd build/sanitize && $(SANITIZE_ENV) $(CURDIR)/$(PY) -m pytest -p no:cacheprovider $(ARGS)

# What a release uploads: the source; of it a wheel for x86-64 Linux, without the CUDA kernels, which source and checkout
# build where nvcc is; and a pure-Python wheel. PLATFORM is that of PyTorch's own wheels, and the least of the library's
# symbols: csrc/cpu/older_libraries.cpp. A compiler that brings newer ones is auditwheel's error here.
PLATFORM ?= manylinux_2_28_x86_64
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
DIST := dist/.made
$(DIST): $(VENV)/.extra-release setup.py CMakeLists.txt MANIFEST.in README.md $(CSRC) $(shell find kdfast -name '*.py')
	rm -rf dist build/wheels
	KDFAST_BUILD_EXT=1 KDFAST_CUDA=0 $(PY) -m build --no-isolation --outdir build/wheels .
	mkdir dist && mv build/wheels/*.tar.gz dist
	$(IN_VENV) auditwheel repair --plat $(PLATFORM) --only-plat --exclude 'libtorch*.so' --wheel-dir dist \
	    build/wheels/*.whl
	KDFAST_BUILD_EXT=0 $(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	@touch $@

wheels: $(DIST) ## dist/: the source, a wheel for x86-64 Linux, a pure-Python wheel; sizes
	$(IN_VENV) auditwheel show dist/*manylinux*.whl
	@cd dist && stat --format='%s bytes  %n' *

# Each file of dist/ in a venv that shares nothing but torch with .venv, used as a user would. The source is built as a
# user's pip does it, isolated; KDFAST_CUDA=1 builds its CUDA kernels too.
build-check: $(DIST) ## each file of dist/ installed into an empty venv and used
	rm -rf build/check
	$(IN_VENV) twine check --strict dist/*
	@for kind in wheel pure source; do \
	    case $$kind in \
	        wheel) file=$$(ls dist/*manylinux*.whl); backend=cpu;; \
	        pure) file=$$(ls dist/*-any.whl); backend=reference;; \
	        source) KDFAST_CUDA=$${KDFAST_CUDA:-0} $(PY) -m pip wheel --quiet --no-deps --wheel-dir build/check/source \
	            dist/*.tar.gz && file=$$(ls build/check/source/*.whl) || exit 1; backend=cpu;; \
	    esac; \
	    home=build/check/$$kind/venv && $(PYTHON) -m venv $$home && \
	    $$home/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index $$file && \
	    echo $(SITE) > $$(echo $$home/lib/python*/site-packages)/torch.pth && \
	    (cd build/check && echo "$$kind: $$file" && $$kind/venv/bin/python $(CURDIR)/tests/smoke.py $$backend) || exit 1; \
	done

# What kernel-builder of the Hugging Face Hub takes, in build/hub/kdfast, and its CPU variant built by this CMake.
hub-check: $(VENV)/.extra-release ## kdfast as a Hub kernel: written, its CPU variant built, loaded and used
	PYTHONPATH=$(CURDIR):tools $(PY) tools/hub_check.py build/hub

arm-check: $(VENV)/.torch ## the kernels cross-compiled for 64-bit Arm, their check under emulation
	@for need in aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64:qemu-user; do command -v $${need%%:*} \
	    > /dev/null || { echo "arm-check needs $${need%%:*}: Debian's package $${need##*:}"; exit 1; }; done
	$(CMAKE) -S . -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	$(VENV)/bin/cmake --build build/aarch64 --target kernel_check
	qemu-aarch64 build/aarch64/kernel_check

clean: ## remove what was built; the set-up stays (rm -r .venv)
	rm -rf build dist kdfast/*.so *.egg-info $(BUILT)
