"""Contestants and shapes: mmkernels/bench/channel_attention.py"""

OPERATION = "channel_attention"


def bench(measure):
    measure()
