"""The backends that can run an operation here, alone and with its cases, as parameters of tests."""

import pytest
import torch

from mmkernels import backends, cases


def runnable(operation, dtypes=(torch.float32,)):
    """(backend, device, dtype) of everything that can run an operation here, as parameters of a test."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        pytest.param(backend, device, dtype, id=f"{backend}-{device}-{str(dtype).removeprefix('torch.')}")
        for device in devices
        for backend in backends.names()
        for dtype in dtypes
        if backends.why_not(backend, operation, device, dtype) is None
    ]


def runnable_cases(operation):
    """(backend, device, dtype, case): every case on everything that can run it; a slow backend takes the small ones.
    The backends of a case and dtype follow each other, for the truth is computed once for all. (The reference is the
    truth: it is compared in float32 alone.)"""
    combinations = sorted(runnable(operation, cases.DTYPES), key=lambda c: (c.values[1], str(c.values[2])))
    return [
        pytest.param(*combination.values, case, id=f"{combination.id}-{case.name}")
        for case in cases.selected(operation)
        for combination in combinations
        if (case.small or not cases.is_slow(*combination.values[:2]))
        and (combination.values[0] != "reference" or combination.values[2] == torch.float32)
    ]
