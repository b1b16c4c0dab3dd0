"""Contestants and shapes: mmkernels/bench/bidirectional_attention.py"""

OPERATION = "bidirectional_attention"


def bench(measure):
    measure()
