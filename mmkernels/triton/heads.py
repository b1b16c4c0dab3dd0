"""Attention over heads in Triton: what gated cross-attention and bidirectional attention share, and how it is launched.
The kernels are in heads_forward.py and heads_backward.py.

Rows attend to columns: queries to tokens, or tokens to positions. A program holds a block of one head's rows and walks
the columns; the scores exist as tiles in registers, forward and backward. Q, K, V = bytes of the rows' queries, of the
columns' keys and values. What is moved:

    attend           reads Q (and the gate) once, writes the result once; K and V are read once a block of rows, from
                     the L2 cache but for the first time: a head of a short text is 10 to 100 KB
    prepare          reads grad, gate and result once, writes the gate's gradient and grad * gate once
    differentiate    reads one side's Q, V, grads once and writes their gradients once, the other side's once a block of
                     rows; launched for either side, so that no two programs add to the same gradient
    merge_*          where a side is too short to fill the device, its columns are split into chunks: the partial sums

Two softmaxes of one score matrix (bidirectional attention) have one backward: a tile's scores feed both.
Scores are never multiplied by more than `scale`, nor are they added to a logarithm of a sum: a mask may add the largest
float there is. Of a softmax the largest score and one over the sum are kept instead; where that is exactly 1, one
weight is 1 and the others are 0, and the scores have no gradient. Every sum has a fixed order: no atomics. Addresses
are 64 bits wide.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..backends import INTERPRETED
from .common import launch, processors
from .heads_backward import differentiate, merge_gradients, prepare
from .heads_forward import attend, merge_attend


class Configuration(NamedTuple):
    rows: int  # of a block
    cols: int  # of a tile
    inner: int  # channels that are multiplied at once; queries and values that fit are loaded once
    outer: int  # channels of a result or gradient that a program holds
    warps: int
    stages: int


# float32 has no tensor cores unless the user allows TF32: small tiles, since each thread multiplies whole rows of them.
# Backward, both softmaxes have five products to the other's three. One rule for all widths: these spill nowhere.
FORWARD = {
    torch.float32: (Configuration(64, 16, 32, 64, 4, 1), Configuration(32, 16, 32, 64, 4, 1)),
    torch.bfloat16: (
        Configuration(64, 32, 64, 128, 4, 2),
        Configuration(128, 32, 64, 128, 8, 2),
        Configuration(32, 32, 64, 128, 4, 2),
    ),
}
BACKWARD = {
    torch.float32: (Configuration(16, 32, 32, 32, 4, 1), Configuration(16, 16, 32, 64, 4, 1)),
    torch.bfloat16: (
        Configuration(32, 32, 64, 64, 4, 2),
        Configuration(64, 16, 64, 64, 8, 2),
        Configuration(16, 32, 64, 64, 4, 2),
    ),
}
BACKWARD_BOTH = {
    torch.float32: (Configuration(16, 32, 32, 32, 4, 1), Configuration(16, 16, 32, 64, 4, 1)),
    torch.bfloat16: (Configuration(16, 32, 64, 64, 4, 2), Configuration(32, 16, 64, 64, 4, 2)),
}
MERGE = {"BLOCK_N": 16, "num_warps": 4}


def compiler_options():
    """ptxas would rather spill a little and fit one more program on a multiprocessor; only it knows the option."""
    nvidia = not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda"
    return {"maxnreg": 255} if nvidia else {}


def block(size, most):
    """A power of 2, and what tl.dot takes."""
    return min(max(triton.next_power_of_2(max(size, 1)), 16), most)


class Heads:
    """The sizes of one call, and how a configuration cuts it into programs."""

    def __init__(self, query, channels, scale, both):
        self.like, self.scale = query, scale
        self.dtype = (
            torch.float32 if query.dtype == torch.float32 else torch.bfloat16
        )  # what configurations are listed by
        self.B, self.H, _, self.D = query.shape
        self.V = channels
        dot = (
            tl.float32
            if query.dtype == torch.float32 or INTERPRETED and query.dtype == torch.bfloat16
            else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[query.dtype]
        )
        tf32 = query.is_cuda and torch.backends.cuda.matmul.allow_tf32
        self.options = {"D": self.D, "V": self.V, "BOTH": both}
        self.dots = {"DOT": dot, "PRECISION": "tf32" if tf32 else "ieee"}
        self.key = (self.D, self.V, tf32, triton.next_power_of_2(max(self.B * self.H, 1)))

    def scratch(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.like.device)

    def split(self, programs, columns, tile):
        """(number of chunks, columns of each): enough to fill the device, each long enough to be worth its partial
        sums."""
        wanted = triton.cdiv(4 * processors(self.like), max(programs, 1))
        chunk = tile * max(triton.cdiv(columns, tile * wanted), 4)
        return max(triton.cdiv(columns, chunk), 1), chunk

    def attend(self, configuration, rows, cols, result, pairs=None, bias=None, gate=None, attended=None):
        """Writes result, attended and rows.softmax."""
        block_n = block(rows.size, configuration.rows)
        block_t = block(cols.size, configuration.cols)
        block_d = block(self.D, configuration.inner)
        block_v = block(self.V, configuration.outer)
        blocks = triton.cdiv(rows.size, block_n) * self.B * self.H
        parts = triton.cdiv(self.V, block_v)
        splits, chunk = self.split(blocks * parts, cols.size, block_t)
        stats = partial = None
        if splits > 1:
            stats = self.scratch(self.B * self.H * splits * rows.size, 2)
            partial = self.scratch(self.B * self.H * splits * rows.size, self.V)
        launch(
            attend,
            (blocks * splits, parts),
            rows,
            cols,
            pairs,
            bias,
            gate,
            result,
            attended,
            stats,
            partial,
            self.H,
            splits,
            chunk,
            self.scale,
            **self.options,
            **self.dots,
            BLOCK_N=block_n,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            BLOCK_V=block_v,
            num_warps=configuration.warps,
            num_stages=configuration.stages,
            **compiler_options(),
        )
        if splits > 1:
            block_v = block(self.V, 64)
            launch(
                merge_attend,
                (triton.cdiv(rows.size, MERGE["BLOCK_N"]) * self.B * self.H, triton.cdiv(self.V, block_v)),
                rows,
                gate,
                result,
                attended,
                stats,
                partial,
                self.H,
                splits,
                V=self.V,
                BLOCK_V=block_v,
                **MERGE,
            )

    def prepare(self, rows, grad, combined, gate=None, grad_gate=None):
        """Writes rows.delta, rows.grad (where there is a gate) and grad_gate."""
        block_v = block(self.V, 128)
        launch(
            prepare,
            triton.cdiv(rows.size, MERGE["BLOCK_N"]) * self.B * self.H,
            rows,
            grad,
            gate,
            combined,
            grad_gate,
            self.H,
            V=self.V,
            BLOCK_V=block_v,
            **MERGE,
        )

    def differentiate(self, configuration, rows, cols, to_query, to_value, pairs=None, bias=None, grad_bias=None):
        """Writes the gradients of rows.query and rows.value, those that are wanted."""
        if to_query is None and to_value is None and grad_bias is None:
            return
        block_n = block(rows.size, configuration.rows)
        block_t = block(cols.size, configuration.cols)
        inner = {"BLOCK_D": block(self.D, configuration.inner), "BLOCK_V": block(self.V, configuration.inner)}
        outer = {"OUT_D": block(self.D, configuration.outer), "OUT_V": block(self.V, configuration.outer)}
        blocks = triton.cdiv(rows.size, block_n) * self.B * self.H
        parts = self.parts(to_query, to_value, outer)
        splits, chunk = self.split(blocks * parts, cols.size, block_t)
        partial = [
            self.scratch(self.B * self.H * splits * rows.size, width) if splits > 1 and to is not None else None
            for to, width in ((to_query, self.D), (to_value, self.V))
        ]
        launch(
            differentiate,
            (blocks * splits, parts),
            rows,
            cols,
            pairs,
            bias,
            grad_bias,
            to_query,
            to_value,
            *partial,
            self.H,
            splits,
            chunk,
            self.scale,
            **self.options,
            **self.dots,
            BLOCK_N=block_n,
            BLOCK_T=block_t,
            **inner,
            **outer,
            ALL_ROWS=rows.size <= block_n,
            ALL_COLS=cols.size <= block_t,
            CENTRED=rows.grad is not None and to_query is not None,
            num_warps=configuration.warps,
            num_stages=configuration.stages,
            **compiler_options(),
        )
        if splits > 1 and any(p is not None for p in partial):
            outer = {"OUT_D": block(self.D, 64), "OUT_V": block(self.V, 64)}
            launch(
                merge_gradients,
                (triton.cdiv(rows.size, MERGE["BLOCK_N"]) * self.B * self.H, self.parts(to_query, to_value, outer)),
                rows,
                to_query,
                to_value,
                *partial,
                self.H,
                splits,
                self.scale,
                **self.options,
                **outer,
                **MERGE,
            )

    def parts(self, to_query, to_value, outer):
        return max(
            triton.cdiv(self.D, outer["OUT_D"]) if to_query is not None else 1,
            triton.cdiv(self.V, outer["OUT_V"]) if to_value is not None else 1,
        )
