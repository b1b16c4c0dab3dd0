"""Gated cross-attention in Triton: queries are the rows, tokens the columns.

The kernels are in heads_forward.py and heads_backward.py.

Forward: one pass; the gate is multiplied where the result still lies in registers. Backward: the gate's gradient and
delta, then the queries' gradient (and the bias's) with tokens as columns, then keys' and values' with queries as
columns.
"""

import torch
import triton

from ..ops.common import empty_heads, empty_softmax, softmax_shape
from ..ops.gated_cross_attention import OPERATION
from .common import define, on_device, require, tuned
from .heads import BACKWARD, FORWARD, Heads
from .heads_tiles import Side, head_rows, swapped, token_mask


class Problem:
    """The arguments of one call, checked."""

    def __init__(self, query, key, value, gate, mask, pairs, bias, scale):
        if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(f"query must be float32, bfloat16 or float16, got {query.dtype}")
        if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
            raise RuntimeError("query, key and value must be [B, H, N, d], [B, H, T, d] and [B, H, T, dv]")
        B, H, N, d = query.shape
        T, dv = key.shape[2], value.shape[3]
        if d < 1 or dv < 1:
            raise RuntimeError("query and value must have at least one channel")
        if bias is not None and (mask is not None or pairs is not None):
            raise RuntimeError("bias goes with neither tokens nor pairs")
        if pairs is not None and mask is None:
            raise RuntimeError("pairs need tokens: which of them any query attends to")
        self.shape = B, H, N, dv
        require(key, "key", query, (B, H, T, d))
        require(value, "value", query, (B, H, T, dv))
        for t, name, shape, dtype in (
            (gate, "gate", self.shape, None),
            (mask, "tokens", (B, H, T), torch.bool),
            (pairs, "pairs", (B, H, N, T), torch.bool),
            (bias, "bias", (B, H, N, T), torch.float32),
        ):
            if t is not None:
                require(t, name, query, shape, dtype)
        self.heads = Heads(query, dv, float(scale), both=False)
        self.queries = Side(N, head_rows(query), None, None, None, None, None)
        self.tokens = Side(T, head_rows(key), head_rows(value), token_mask(mask), None, None, None)
        self.pairs = {"pairs": None if pairs is None else head_rows(pairs.view(torch.uint8)), "bias": head_rows(bias)}
        self.key = (
            *self.heads.key,
            triton.next_power_of_2(max(N, 1)),
            triton.next_power_of_2(max(T, 1)),
            gate is None,
            mask is None,
            pairs is None,
            bias is None,
        )


def forward(query, key, value, gate, mask, pairs, bias, scale, need_attended):
    problem = Problem(query, key, value, gate, mask, pairs, bias, scale)
    need_attended = need_attended and gate is not None
    result = empty_heads(query, problem.shape[3])
    attended = empty_heads(query, problem.shape[3]) if need_attended else query.new_empty(0)
    softmax = empty_softmax(query)
    queries = problem.queries._replace(softmax=softmax)

    def run(configuration):
        problem.heads.attend(
            configuration,
            queries,
            problem.tokens,
            head_rows(result),
            gate=head_rows(gate),
            attended=head_rows(attended) if need_attended else None,
            **problem.pairs,
        )

    with on_device(query):
        run(tuned(("gated forward", need_attended, *problem.key), FORWARD[problem.heads.dtype], query, run))
    return result, attended, softmax


def backward(
    grad_result,
    query,
    key,
    value,
    gate,
    mask,
    pairs,
    bias,
    attended,
    softmax,
    scale,
    need_attended,
    need_query_grad,
    need_key_grad,
    need_value_grad,
    need_gate_grad,
    need_bias_grad,
):
    problem = Problem(query, key, value, gate, mask, pairs, bias, scale)
    if grad_result is None:
        raise RuntimeError("grad_result must be given")
    require(grad_result, "grad_result", query, problem.shape)
    require(attended, "attended", query, problem.shape)
    require(softmax, "softmax", query, softmax_shape(query), torch.float32)
    like = lambda t, need: empty_heads(t, t.shape[3]) if need and t is not None else query.new_empty(0)
    grads = [
        like(t, need)
        for t, need in (
            (query, need_query_grad),
            (key, need_key_grad),
            (value, need_value_grad),
            (gate, need_gate_grad),
        )
    ]
    need_bias_grad = need_bias_grad and bias is not None
    grad_bias = torch.zeros(
        (*query.shape[:3], key.shape[2]) if need_bias_grad else (0,), dtype=torch.float32, device=query.device
    )
    to_query, to_key, to_value, to_gate = (
        head_rows(t) if need else None
        for t, need in zip(
            grads, (need_query_grad, need_key_grad, need_value_grad, need_gate_grad and gate is not None)
        )
    )
    if not (need_query_grad or need_key_grad or need_value_grad or to_gate or need_bias_grad):
        return (*grads, grad_bias)
    heads = problem.heads
    grad = head_rows(grad_result)

    def run(configuration):
        gated = head_rows(heads.scratch(*problem.shape, dtype=query.dtype)) if gate is not None else grad
        queries = problem.queries._replace(
            softmax=softmax.contiguous(), grad=gated, delta=heads.scratch(*query.shape[:3])
        )
        heads.prepare(queries, grad, head_rows(attended), head_rows(gate), to_gate)
        heads.differentiate(
            configuration,
            queries,
            problem.tokens,
            to_query,
            None,
            **problem.pairs,
            grad_bias=head_rows(grad_bias) if need_bias_grad else None,
        )
        heads.differentiate(
            configuration,
            problem.tokens,
            queries,
            to_key,
            to_value,
            **{name: swapped(t) for name, t in problem.pairs.items()},
        )

    with on_device(query):
        run(
            tuned(
                ("gated backward", need_query_grad, need_key_grad, need_value_grad, need_bias_grad, *problem.key),
                BACKWARD[problem.heads.dtype],
                query,
                run,
            )
        )
    return (*grads, grad_bias)


define(OPERATION.schema.forward("gated_cross_attention_triton"), forward)
define(OPERATION.schema.backward("gated_cross_attention_triton"), backward)
OPERATION.register("gated_cross_attention_triton", "triton")
