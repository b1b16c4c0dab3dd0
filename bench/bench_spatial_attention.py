"""Contestants and shapes: mmkernels/bench/spatial_attention.py"""

OPERATION = "spatial_attention"


def bench(measure):
    measure()
