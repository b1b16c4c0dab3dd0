"""What all tests share: fresh memory full of NaN, few threads, and the backends that can run here."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # waiting threads don't spin: many times faster on a busy machine

import emulated  # noqa: F401  (registers the backend "cuda-emulated")
import interpreter  # noqa: F401  (makes Triton's interpreter faster)
import pytest
import torch
from torch.utils import deterministic

from mmkernels import backends, cases

try:
    from hypothesis import settings
except ModuleNotFoundError:
    pass
else:
    # The same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
    settings.register_profile("default", deadline=None, derandomize=True, max_examples=60, database=None)
    settings.register_profile("explore", deadline=None, max_examples=2000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(2)

UNBUILT_ALLOWED = os.environ.get("MMKERNELS_TEST_ALLOW_UNBUILT") == "1"


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(request):
    """`empty` returns NaN, so that an element that nobody wrote shows. Virtual memory must stay untouched, though."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = "virtual_memory" not in request.keywords
    yield
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def extension():
    """The compiled extension; without it a test fails, unless MMKERNELS_TEST_ALLOW_UNBUILT=1."""
    if backends.extension is None:
        (pytest.skip if UNBUILT_ALLOWED else pytest.fail)(backends.extension_error)
    return backends.extension


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than about 5 s")
    config.addinivalue_line("markers", "virtual_memory: makes huge tensors that it doesn't touch")


def runnable(operation, dtypes=(torch.float32,)):
    """(backend, device, dtype) of everything that can run an operation here, as parameters of a test."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [pytest.param(backend, device, dtype, id=f"{backend}-{device}-{str(dtype).removeprefix('torch.')}")
            for device in devices for backend in backends.names() for dtype in dtypes
            if backends.why_not(backend, operation, device, dtype) is None]


def runnable_cases(operation):
    """(backend, device, dtype, case): every case on everything that can run it; a slow backend takes the small ones."""
    return [pytest.param(*combination.values, case, id=f"{combination.id}-{case.name}")
            for combination in runnable(operation, cases.DTYPES) for case in cases.selected(operation)
            if case.small or not cases.is_slow(*combination.values[:2])]
