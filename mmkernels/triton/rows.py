"""What channel and additive attention in Triton share: all samples' rows as one matrix, which goes through the products
panel by panel.

A layer's product is torch's library's; a panel's scores or hidden vectors stay in the L2 cache until a kernel has
turned them into what is kept. Nothing is summed by atomics: panels follow each other on the stream, and a sum over rows
has one program a column.
"""

import torch
import triton
import triton.language as tl

from .common import all_have_read, launch, require

PANEL_BYTES = 4 << 20  # of scores in flight
WIDEST = 2048  # channels that a program holds at most; more are walked


def nothing_kept(kept_rows):
    if kept_rows:
        raise RuntimeError(f"kept_rows must be 0, got {kept_rows}: only the CPU keeps rows")


class Rows:
    """All rows of ``image`` [B, N, D], or packed [rows, D] with ``offsets``; masked ones may hold anything."""

    def __init__(self, image, mask=None, offsets=None):
        self.image, self.offsets = image, offsets
        self.samples = image.shape[0] if offsets is None else offsets.shape[0] - 1
        self.positions = image.shape[-2]
        self.count = image.shape[:-1].numel()
        self.channels = image.shape[-1]
        # One matrix, where samples follow each other with the rows' stride
        matrix = image.dim() == 2 or 1 in image.shape[:2] or image.stride(0) == self.positions * image.stride(1)
        self.flat = image.flatten(0, -2) if matrix else None
        self.mask = None if mask is None else mask.flatten().contiguous()

    def panels(self, width):
        """(first row, last row + 1) of panels whose rows hold `width` scores."""
        step = max(16, PANEL_BYTES // (width * 4) // 16 * 16)
        count = self.count if self.samples else 0  # rows of no bag: only where nobody has looked at the offsets
        return [(first, min(first + step, count)) for first in range(0, count, step)]

    def panel(self, first, last):
        """Rows as a matrix [rows, D], a view where it can be, never a copy of more; masked rows are 0."""
        size = self.positions
        if self.flat is not None:
            rows = self.flat[first:last]
        elif first // size == (last - 1) // size:
            rows = self.image[first // size, first % size : first % size + last - first]
        else:  # the end of a sample, whole ones, the beginning of another
            begin = triton.cdiv(first, size)
            end = last // size
            parts = (
                self.image[begin - 1 : begin, first - (begin - 1) * size :],
                self.image[begin:end],
                self.image[end : end + 1, : last - end * size],
            )
            rows = torch.cat([part.flatten(0, 1) for part in parts if part.numel()])
        return rows if self.mask is None else rows.where(self.mask[first:last, None], 0)

    def sample(self, first, last):
        """Which sample each row belongs to, int32."""
        number = torch.arange(first, last, device=self.image.device)
        if self.offsets is None:
            return (number // self.positions).to(torch.int32)
        return (
            torch.searchsorted(self.offsets, number, right=True, out_int32=True)
            .sub_(1)
            .clamp_(0, max(self.samples - 1, 0))
        )

    def bounds(self):
        """Every sample's first row, and the last one's end, int64 [B + 1]."""
        if self.offsets is not None:
            return self.offsets
        return (
            torch.arange(0, self.count + 1, max(self.positions, 1), device=self.image.device)
            if self.positions
            else torch.zeros(self.samples + 1, dtype=torch.int64, device=self.image.device)
        )


def product(rows, weight):
    """rows weight^T, not rounded: float32 whatever goes in."""
    if rows.dtype == torch.float32:
        return rows @ weight.T
    if rows.is_cuda and torch.version.hip is None:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    if rows.is_cuda:  # ROCm's library has no such product
        return (rows @ weight.T).float()
    return rows.float() @ weight.float().T


class WeightGradient:
    """Sum over panels of ``grad_output^T rows`` in float32, for a layer's weight."""

    def __init__(self, weight, need):
        self.weight, self.need = weight, need
        self.sum = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need else None

    def add(self, grad_output, rows):
        if self.need and rows.dtype == torch.float32:
            self.sum.addmm_(grad_output.T, rows)
        elif self.need:
            self.sum.add_(product(grad_output.T, rows.T))

    def result(self):
        return self.sum.to(self.weight.dtype) if self.need else self.weight.new_empty(0)


class TextProjection:
    """``bias_hidden = text layer^T + bias`` [samples, width] in float32: the bias alone without a text, None without
    either. ``names``: of the text and of the layer."""

    def __init__(self, samples, width, text, layer, bias, image, names):
        if (text is None) != (layer is None):
            raise RuntimeError(f"{names[0]} and {names[1]} must be given together")
        if text is not None:
            require(text, names[0], image, (samples, text.shape[-1]))
            require(layer, names[1], image, (width, text.shape[-1]))
        if bias is not None:
            require(bias, "bias", image, (width,))
        self.text, self.layer, self.bias = (None if t is None else t.float() for t in (text, layer, bias))
        self.samples = samples
        self.dtype = image.dtype

    def bias_hidden(self):
        if self.text is not None:
            return torch.nn.functional.linear(self.text, self.layer, self.bias)
        return None if self.bias is None else self.bias.expand(self.samples, -1).contiguous()

    def needed(self, text, layer, bias):
        """Which of the three gradients are wanted, of what there is."""
        given = self.text is not None
        return text and given, layer and given, bias and self.bias is not None

    def gradients(self, grad, grad_layer, needs):
        """Of the text and the bias, where they are needed; the layer's goes to `grad_layer`."""
        need_text, need_layer, need_bias = needs
        if need_layer:
            grad_layer.copy_(grad.T @ self.text)
        none = lambda: grad.new_empty(0, dtype=self.dtype)  # a tensor each: results can't share one
        return (
            (grad @ self.layer).to(self.dtype) if need_text else none(),
            grad.sum(0).to(self.dtype) if need_bias else none(),
        )


def blocks(channels, elements=2048):
    """(rows, channels) of a program's tile, and its warps."""
    block = min(triton.next_power_of_2(channels), WIDEST)
    return max(1, elements // block), block, 4


@triton.jit
def add_columns(to, grad_output, bounds, first, last, step, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """to[b, c] += sum of a panel's rows of sample b; a program has one sample and some columns."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.maximum(tl.load(bounds + b), first)
    end = tl.minimum(tl.load(bounds + b + 1), last)
    total = tl.zeros([BLOCK_C], tl.float32)
    for n in range(begin, end, BLOCK_N):
        r = n + tl.arange(0, BLOCK_N).to(tl.int64)
        x = tl.load(
            grad_output + (r - first)[:, None] * step + c[None, :],
            mask=(r < end)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total += tl.sum(x.to(tl.float32), 0)
    if begin < end:
        at = to + b * C + c
        total += tl.load(at, mask=c < C, other=0.0)
        all_have_read()
        tl.store(at, total, mask=c < C)


def sum_columns(to, grad_output, bounds, first, last):
    """to [B, C] += column sums of grad_output [rows first to last, C], a sample each."""
    samples, channels = to.shape
    block = min(64, triton.next_power_of_2(channels))
    launch(
        add_columns,
        (samples, triton.cdiv(channels, block)),
        to,
        grad_output,
        bounds,
        first,
        last,
        grad_output.stride(0),
        channels,
        BLOCK_N=32,
        BLOCK_C=block,
    )
