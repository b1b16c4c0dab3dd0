# make demo   installs, builds, verifies the kernels, trains the reference model fused and unfused, writes out/demo.html
# make lint   style, in seconds: needs no installation of the package        make format   puts it right
# make test   the tests            make test-slow, test-triton, test-triton-oldest   the rest: .ci/run runs all
# make test-oldest      the tests with the oldest torch that pyproject.toml allows: downloads gigabytes
# make integrations     the packages that models come from: without them their tests are skipped
# make coverage-table   which property is shown of which operation on which backend
TORCH  := torch==2.13.0
TRITON := triton==3.9.*; platform_system == 'Linux'
LINT   := "ruff==0.17.*" "clang-format==23.1.*"
PYTHON ?= python3
VENV   := .venv
# Threads that wait shouldn't spin: on a busy machine they would keep the others from working.
export OMP_WAIT_POLICY ?= passive
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# From tests/, so that what is installed is tested, wheel or checkout. Each of two workers has one thread, but for tests that divide work.
WORKERS ?= 2
PYTEST  := cd tests && ../$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 10
# make test HELD=avx2 (or baseline): kernels and torch keep to older instructions, and sums run in another order.
ifdef HELD
export MMKERNELS_CPU_ISA := $(HELD)
export ATEN_CPU_CAPABILITY := $(if $(filter baseline,$(HELD)),default,$(HELD))
export MKL_ENABLE_INSTRUCTIONS := $(if $(filter baseline,$(HELD)),SSE4_2,AVX2)
export MKL_CBWR := $(if $(filter baseline,$(HELD)),COMPATIBLE,AVX2)
export ONEDNN_MAX_CPU_ISA := $(if $(filter baseline,$(HELD)),SSE41,AVX2)
# What the compiler made for one processor must not be taken on another.
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/build/inductor-$(HELD)
endif

.PHONY: demo lint format test test-slow test-oldest test-triton test-triton-oldest integrations coverage-table bench bench-quick docs gpu-check install clean mutants

# Not from here: python -m would import the checkout, which has no kernels where the wheel was installed.
demo: install
	cd $(VENV) && bin/python -m mmkernels demo --out "$(CURDIR)/out"

test: install
	$(PYTEST) -m "not slow"

NATIVE = $(shell git ls-files '*.cpp' '*.h' '*.cu')
$(VENV)/.lint: Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(LINT)
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(NATIVE)

test-slow: install
	$(PYTEST) -m slow

# In an environment of its own, as a wheel: what lies in place stays built for the newest. Made anew each time, as Python
# files may have changed; what includes no header of torch isn't compiled again.
OLDEST = $(or $(shell sed -n 's/^dependencies = .*"torch>=\([0-9.]*\)".*/torch==\1/p' pyproject.toml),$(error no oldest torch in pyproject.toml))
test-oldest:
	rm -f .venv-oldest/.installed
	$(MAKE) test WHEEL=1 VENV=.venv-oldest TORCH="$(OLDEST)" TRITON="triton==3.6.*"

# The same cases on the Triton kernels, run by Triton's interpreter.
test-triton: install
	TRITON_INTERPRET=1 && export TRITON_INTERPRET && $(PYTEST) -k triton --ignore test_triton_compile.py

# The oldest Triton that is supported compiles every kernel, too; beside the newest, which is installed.
OLDEST_TRITON := build/triton-3.6
$(OLDEST_TRITON): $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ "triton==3.6.*"
	touch $@

test-triton-oldest: install $(OLDEST_TRITON)
	export MMKERNELS_OLDEST_TRITON=$(abspath $(OLDEST_TRITON)) && $(PYTEST) -m slow -k oldest_triton test_triton_compile.py

# timm and open_clip ask for torchvision, which would bring another torch; what we use of them does without.
INTEGRATIONS := -c tests/integrations.txt "$(TORCH)"
$(VENV)/.integrations: $(STAMP) tests/integrations.txt
	$(BIN)/python -m pip install --quiet $(INTEGRATIONS) transformers diffusers keras kernels monai torchmil ftfy \
		accelerate peft onnx onnxscript
	$(BIN)/python -m pip install --quiet --no-deps $(INTEGRATIONS) timm open_clip_torch
	touch $@

integrations: $(VENV)/.integrations

# What the tests show of which operation on which backend, what can't be and why; fails where something is missing.
coverage-table: install
	cd tests && TRITON_INTERPRET=1 ../$(BIN)/python coverage_table.py

bench: install
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench,cli]"
	$(BIN)/python -m mmkernels bench --json bench/results.json --plot bench/results.png

# Every benchmark runs and is right, on few shapes and against no compiler; its times are too short to mean anything.
bench-quick: install
	cd bench && ../$(BIN)/python -m pytest --quick -k "not compile" --benchmark-max-time 0.05 --benchmark-min-rounds 2

# What is generated: from the docstrings, and from benchmarks' results.
docs: install
	$(BIN)/python tools/api_reference.py
	$(BIN)/python tools/bench_table.py

# Plants bugs in a copy of this tree, one at a time, and fails where no test notices: make mutants ONLY=cuda, ONLY=cpu:channel.
mutants: install
	$(BIN)/python tools/mutants $(if $(ONLY),--only "$(ONLY)") $(if $(RESUME),--resume)

# For a machine with a GPU, with PYTHON's own packages and no network: builds in place, checks, times, and writes gpu-check.json to send back.
# make gpu-check ONLY="build verify-" runs some of the steps; tools/gpu_check.py --list tells them.
gpu-check:
	$(PYTHON) tools/gpu_check.py $(if $(ONLY),--only $(ONLY))

install: $(STAMP)

# torch first, then the package without build isolation: an isolated build would fetch a torch of its own (several GB).
$(VENV)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel "pybind11>=2.13" "ninja>=1.11"
	touch $@

# make install WHEEL=1 installs a wheel, as users get it, instead of this checkout.
# What takes long is compiled before, as pip would hide how far it is; it finds the objects in build/. Triton comes last
# and alone: a torch with CUDA asks for one version of it, and would be replaced.
$(STAMP): $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python setup.py --quiet build_ext
ifdef WHEEL
	rm -rf dist && $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$$(echo dist/*.whl)[cli,demo,denoise,test]"
else
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[cli,demo,denoise,test]"
endif
	$(BIN)/python -m pip install --quiet --no-deps "$(TRITON)"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist out mmkernels/*.so *.egg-info
