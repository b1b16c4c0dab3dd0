"""Spatial attention in Triton. S = bytes of the image features. What the kernels move, against the minimum (the kernels
are in spatial_forward.py and spatial_backward.py):

    sample fits a program (`whole`)  multiply: read S, write S; pool: read S; backward: read 2 S (pool: S), write S.
                                     The minimum.
    larger samples                   `chunks` reads S, and 2 S backward; then `apply` reads S once more to multiply,
                                     and its gradient once more backward; pool reads nothing again. What fits the L2
                                     cache comes from there.

A program holds BLOCK_N whole rows of one head in registers, so that nothing is loaded twice by one kernel; heads are
programs of their own. A larger sample is cut into chunks of s.chunk positions, each a few tiles of BLOCK_N: `chunks`
leaves every chunk's softmax statistics (and weighted sum), `merge` joins a sample's, `apply` finishes the weights.
A packed bag that fits goes through `whole`, the others through chunks; which is which, only the device knows.
The mathematics, and why the sums are centred as they are, is in csrc/cpu/spatial_attention.cpp.

Every sum has a fixed order: no atomics. Indices are 64 bits wide. bfloat16 and float16 are computed in float32.
"""

from typing import NamedTuple

import torch
import triton

from ..ops.spatial_attention import OPERATION
from .common import (
    MAX_TILE,
    define,
    features,
    launch,
    mask_features,
    merge_rows,
    on_device,
    processors,
    require,
    tuned,
    vectors,
)
from .spatial_backward import backward_apply, backward_chunks, backward_merge, backward_whole
from .spatial_forward import forward_apply, forward_chunks, forward_merge, forward_whole
from .spatial_tiles import Arguments, Gradients, Sizes


class Configuration(NamedTuple):
    tile: int  # elements of one tensor that a program holds at once
    warps: int


FORWARD = (Configuration(8192, 8), Configuration(8192, 4), Configuration(4096, 4), Configuration(8192, 16))
BACKWARD = (
    Configuration(4096, 4),
    Configuration(8192, 8),
    Configuration(4096, 8),
    Configuration(2048, 4),
    Configuration(8192, 16),
)
MERGE = {"BLOCK_K": 32, "BLOCK_C": 64, "num_warps": 4}


class Problem:
    """The arguments of one call, checked, and how a configuration cuts it into programs."""

    def __init__(self, image, text, mask, offsets, scale, num_heads, weights=None, *others):
        """`others`: further tensors like image, or None, that are walked with it."""
        packed = offsets is not None
        device = image.device
        if image.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(f"image must be float32, bfloat16 or float16, got {image.dtype}")
        if image.dim() not in ((2,) if packed else (3, 4)):
            raise RuntimeError("image must be [B, N, D] or [B, D, Y, X], or [rows, D] with offsets")
        self.image = image
        self.B = offsets.shape[0] - 1 if packed else image.shape[0]
        self.D = image.shape[1 if image.dim() != 3 else 2]
        height, width = image.shape[2:] if image.dim() == 4 else (1, image.shape[0 if packed else 1])
        self.N, self.H = height * width, num_heads
        if self.D < 1 or self.H < 1 or self.D % self.H:
            raise RuntimeError(f"num_heads must divide image's {self.D} channels, got {num_heads}")
        self.C = self.D // self.H
        self.block_c = triton.next_power_of_2(self.C)
        if self.block_c > MAX_TILE:
            raise RuntimeError(f"image may have at most {MAX_TILE} channels a head in Triton, got {self.C}")
        require(text, "text", image, (self.B, self.D))
        if mask is not None:
            require(
                mask,
                "mask",
                image,
                image.shape[:1] if packed else image.shape[:2] if image.dim() == 3 else (self.B, height, width),
                torch.bool,
            )
            mask = mask_features(mask, packed)
        if packed:
            require(offsets, "offsets", image, (self.B + 1,), torch.int64)
            offsets = offsets.contiguous()
        self.weights_shape = (self.H, self.N) if packed else (self.B, self.H, self.N)
        if weights is None:
            weights = torch.empty(self.weights_shape, dtype=torch.float32, device=device)
        require(weights, "weights", image, self.weights_shape, torch.float32)
        X, image, mask, *self.others = merge_rows(
            height, width, features(image), mask, *(None if t is None else features(t) for t in others)
        )
        self.planes = image.x == 1 and image.d != 1
        self.a = Arguments(
            image,
            vectors(text),
            mask,
            offsets,
            weights.contiguous(),
            Sizes(self.B, self.N, X, self.H, 1, 1),
            float(scale),
        )
        self.key = (
            self.C,
            self.H,
            packed,
            self.planes,
            X is None,
            mask is None,
            triton.next_power_of_2(max(self.B, 1)),
            triton.next_power_of_2(max(self.N, 1)),
        )

    def cut(self, configuration, largest_whole):
        """The arguments, the number of samples that go through `whole` and through chunks, the number of chunks, and
        the kernels' options for both."""
        packed = self.a.offsets is not None
        longest = triton.next_power_of_2(max(self.N, 1))
        block_n = min(max(configuration.tile // self.block_c, 1), longest, 1024)
        fits = min(max(largest_whole // self.block_c, 1), longest, 1024)
        # Enough chunks to fill the device eight times; where positions are contiguous, a chunk has a cache line of
        # them, so that what a narrow tile leaves of a line is read by the same program's next one, from the first-level
        # cache.
        tiles = triton.cdiv(self.N, block_n) * self.H * (1 if packed else self.B)
        chunk = block_n * min(max(tiles // (8 * processors(self.image)), 1), 16)
        chunk = max(chunk, 128 // self.image.element_size() if self.planes else 1)
        a = self.a._replace(s=self.a.s._replace(chunk=chunk, fits=fits))

        def options(block_n):
            warps = min(max(configuration.warps, block_n * self.block_c // 2048), 16)
            return {"C": self.C, "BLOCK_N": block_n, "BLOCK_C": self.block_c, "num_warps": warps}

        chunked = fits < self.N
        whole = self.B if packed or not chunked else 0
        chunks = (
            triton.cdiv(self.N, chunk) * (1 if packed else self.B) + (self.B if packed else 0)
            if chunked and self.B
            else 0
        )
        return a, whole, self.B if chunked else 0, chunks, options(fits), options(block_n)

    def scratch(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.image.device)


def forward_into(result, image, text, mask, offsets, scale, num_heads, pool, rescale):
    """Writes the result and returns the weights."""
    problem = Problem(image, text, mask, offsets, scale, num_heads, None, None if pool else result)
    require(result, "out", image, text.shape if pool else image.shape)
    H, C = problem.H, problem.C

    def run(configuration, result):
        a, whole, chunked, chunks, whole_options, options = problem.cut(configuration, 16384)
        stats = problem.scratch(3, chunks * H)
        merged = problem.scratch(chunked * H, 2)
        partial = problem.scratch(chunks * H, C) if pool else None
        multiplied, pooled = (None, vectors(result)) if pool else (problem.others[0]._replace(data=result), None)
        launch(forward_whole, whole * H, a, multiplied, pooled, RESCALE=rescale, **whole_options)
        launch(forward_chunks, chunks * H, a, stats, partial, **options)
        launch(
            forward_merge,
            (chunked * H, triton.cdiv(C, MERGE["BLOCK_C"]) if pool else 1),
            a,
            stats,
            partial,
            pooled,
            merged,
            chunks * H,
            RESCALE=rescale,
            C=C,
            **MERGE,
        )
        launch(forward_apply, chunks * H, a, multiplied, merged, **options)

    with on_device(image):
        # Measuring repeats the work: in a tensor of its own, since the result may be the image itself.
        configuration = tuned(
            ("forward", pool, *problem.key),
            FORWARD,
            image,
            lambda configuration: run(
                configuration,
                torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device),
            ),
        )
        run(configuration, result)
    return problem.a.weights


def forward(image, text, mask, offsets, scale, num_heads, pool, rescale):
    result = torch.empty_like(text, memory_format=torch.contiguous_format) if pool else torch.empty_like(image)
    weights = forward_into(result, image, text, mask, offsets, scale, num_heads, pool, rescale)
    return result, weights


def forward_out(image, text, mask, offsets, scale, num_heads, pool, rescale, out):
    return forward_into(out, image, text, mask, offsets, scale, num_heads, pool, rescale)


def backward(
    grad_result,
    grad_weights,
    image,
    text,
    mask,
    offsets,
    weights,
    scale,
    num_heads,
    pool,
    rescale,
    need_image_grad,
    need_text_grad,
):
    grad_image = torch.empty_like(image) if need_image_grad else image.new_empty(0)
    grad_text = torch.empty_like(text, memory_format=torch.contiguous_format) if need_text_grad else text.new_empty(0)
    if not (need_image_grad or need_text_grad):
        return grad_image, grad_text
    if grad_result is not None:
        require(grad_result, "grad_result", image, text.shape if pool else image.shape)
    problem = Problem(
        image,
        text,
        mask,
        offsets,
        scale,
        num_heads,
        weights,
        None if pool else grad_result,
        grad_image if need_image_grad else None,
    )
    if grad_weights is not None:
        require(grad_weights, "grad_weights", image, problem.weights_shape, torch.float32)
        grad_weights = grad_weights.contiguous()
    H, C = problem.H, problem.C
    g = Gradients(
        problem.others[0],
        vectors(grad_result) if pool and grad_result is not None else None,
        grad_weights,
        problem.others[1],
        vectors(grad_text) if need_text_grad else None,
        None,
    )

    def run(configuration):
        a, whole, chunked, chunks, whole_options, options = problem.cut(configuration, 8192)
        stats = problem.scratch(2, chunks * H)
        merged = problem.scratch(chunked * H)
        partial = problem.scratch(chunks * H, 2, C) if need_text_grad else None
        scored = g._replace(scores=problem.scratch(*problem.weights_shape)) if need_image_grad and chunks else g
        launch(backward_whole, whole * H, a, g, **whole_options)
        launch(backward_chunks, chunks * H, a, scored, stats, partial, **options)
        launch(
            backward_merge,
            (chunked * H, triton.cdiv(C, MERGE["BLOCK_C"]) if need_text_grad else 1),
            a,
            g,
            stats,
            partial,
            merged,
            chunks * H,
            C=C,
            **MERGE,
        )
        if need_image_grad:
            launch(backward_apply, chunks * H, a, scored, merged, **options)

    with on_device(image):
        run(tuned(("backward", pool, need_image_grad, need_text_grad, *problem.key), BACKWARD, image, run))
    return grad_image, grad_text


define(OPERATION.schema.forward("spatial_attention_triton"), forward)
define(OPERATION.schema.into("spatial_attention_triton"), forward_out)
define(OPERATION.schema.backward("spatial_attention_triton"), backward)
OPERATION.register("spatial_attention_triton", "triton")
