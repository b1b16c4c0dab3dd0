"""Contestants and shapes: mmkernels/bench/absorbed_attention.py"""

OPERATION = "absorbed_attention"


def bench(measure):
    measure()
