# make demo   installs, builds, verifies the kernels, trains the reference model fused and unfused, writes out/report.html
# make test   the tests            make test-slow   the slow ones too
TORCH  := torch==2.13.0
PYTHON ?= python3
VENV   := .venv
# Threads that wait shouldn't spin: on a busy machine they would keep the others from working.
export OMP_WAIT_POLICY ?= passive
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow bench install clean

demo: install
	$(BIN)/python -m mmkernels demo --out out

test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

bench: install
	$(BIN)/python -m mmkernels bench --json bench/results.json --plot bench/results.png

install: $(STAMP)

# torch first, then the package without build isolation: an isolated build would fetch a torch of its own (several GB).
$(VENV)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel "pybind11>=2.13"
	touch $@

$(STAMP): $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[cli,demo,test]"
	touch $@

clean:
	rm -rf $(VENV) build out mmkernels/*.so *.egg-info
