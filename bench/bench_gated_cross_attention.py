"""Contestants and shapes: mmkernels/bench/gated_cross_attention.py"""

OPERATION = "gated_cross_attention"


def bench(measure):
    measure()
