# make demo   installs, builds, verifies the kernels, trains the reference model fused and unfused, writes out/demo.html
# make test   the tests            make test-slow   the slow ones too
TORCH  := torch==2.13.0
PYTHON ?= python3
VENV   := .venv
# Threads that wait shouldn't spin: on a busy machine they would keep the others from working.
export OMP_WAIT_POLICY ?= passive
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow test-triton bench gpu-check install clean

demo: install
	$(BIN)/python -m mmkernels demo --out out

test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

# The same cases on the Triton kernels, run by Triton's interpreter.
test-triton: install
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not slow" -k triton tests/test_*_attention.py tests/test_triton.py tests/test_triton_rows.py

bench: install
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench,cli]"
	$(BIN)/python -m mmkernels bench --json bench/results.json --plot bench/results.png

# For a machine with a GPU and the CUDA build of torch in PYTHON's environment: builds the CUDA kernels into it, runs everything there,
# and writes gpu-check.json to send back.
gpu-check:
	MMKERNELS_CUDA=1 $(PYTHON) -m pip install --no-build-isolation --editable ".[cli,test]"
	$(PYTHON) -m mmkernels info
	$(PYTHON) -m mmkernels verify --json gpu-verify.json
	$(PYTHON) -m pytest -m "not slow"
	compute-sanitizer --error-exitcode 1 $(PYTHON) -m mmkernels verify --small --backend cuda
	$(PYTHON) -m mmkernels bench --json gpu-check.json

install: $(STAMP)

# torch first, then the package without build isolation: an isolated build would fetch a torch of its own (several GB).
$(VENV)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel "pybind11>=2.13" "ninja>=1.11"
	touch $@

$(STAMP): $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[cli,demo,test]"
	touch $@

clean:
	rm -rf $(VENV) build out mmkernels/*.so *.egg-info
