"""A few calls of every operation, forward and backward: what tests/test_gpu.py captures and runs in threads. As a
program each runs once and nothing is compared, for compute-sanitizer:

    python tests/support/gpu_calls.py cuda|triton
"""

import functools
import itertools
import sys

import torch

import mmkernels as mmk
from mmkernels import cases, functional, tolerance


def chosen(operation, small=False):
    """Of every group of cases one in its middle and its last; of the empty ones none, for a graph of nothing isn't one,
    nor of those with dropout, for a replay drops other elements."""
    usable = [case for case in cases.selected(operation, small=small) if case.group not in ("empty", "dropout")]
    groups = [list(group) for _, group in itertools.groupby(usable, key=lambda case: case.group)]
    return [group[i] for group in groups for i in sorted({len(group) // 2, len(group) - 1})]


class Call:
    """An operation with its arguments. Called, it gives the results and all gradients; nothing but the operation runs
    then."""

    def __init__(self, operation, case, dtype, device, backend):
        self.case = case
        self.dtype = dtype
        self.device = device
        self.arguments = case.build(dtype, device)
        self.function = functools.partial(getattr(mmk, operation), backend=backend)
        self.names = cases.outputs(operation)
        like = tolerance.evaluate(
            getattr(mmk.reference, operation), case.build(dtype), gradients=False, names=self.names
        )
        self.upstream = [tolerance.upstream_like(i, output).to(device) for i, output in enumerate(like.values())]

    def __call__(self, gradients=True):
        found = tolerance.evaluate(
            self.function,
            self.arguments,
            gradients=gradients,
            names=self.names,
            upstream=lambda i, output: self.upstream[i],
        )
        return list(found.values())

    def change(self, seed):
        """Writes other values into the arguments, where they lie."""
        for name, value in self.case.build(self.dtype, self.device, seed).items():
            if isinstance(value, torch.Tensor):
                _once(self.arguments[name]).copy_(_once(value))

    def __str__(self):
        return f"{self.function.func.__name__} {self.case} {self.dtype}"


def _once(tensor):
    """Every element once, where many share their memory."""
    for dim, stride in enumerate(tensor.stride()):
        tensor = tensor.narrow(dim, 0, 1) if stride == 0 else tensor
    return tensor


def main(backend):
    for operation, dtype in itertools.product(functional.__all__, (torch.float32, torch.bfloat16)):
        for case in chosen(operation):
            Call(operation, case, dtype, "cuda", backend)()
        torch.cuda.synchronize()
        print(operation, dtype, "ran", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
