"""Contestants and shapes: mmkernels/bench/deformable_attention.py"""

OPERATION = "deformable_attention"


def bench(measure):
    measure()
