"""Contestants and shapes: mmkernels/bench/additive_attention.py"""

OPERATION = "additive_attention"


def bench(measure):
    measure()
