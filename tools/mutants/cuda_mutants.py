"""Mutants of the CUDA kernels; the emulator runs them."""

from mutant import Mutant

WARPS = "test_cuts.py -k 'warp_by_warp and spatial'"
ROWS = "test_cuda.py -k rows_however_they_are_cut"
HEADS_WARPS = "test_cuts.py -k 'warp_by_warp and not spatial'"

MUTANTS = (
    Mutant(
        "spatial_attention",
        "no barrier before a tile's mask is loaded",
        "__syncthreads(); $count += b.load_mask(n0, positions);",
        "$count += b.load_mask(n0, positions);",
        WARPS,
    ),
    Mutant(
        "spatial_attention",
        "statistics without the group's first head",
        "t.stats_of(slot_of(chunk), head + h)",
        "t.stats_of(slot_of(chunk), h)",
        "test_cuts.py -k 'many_heads and cuda-emulated'",
    ),
    Mutant(
        "spatial_attention",
        "sum not rescaled to the new maximum",
        "stats.total[h] = stats.total[h] * stats.decay[h] + l;",
        "stats.total[h] = stats.total[h] + l;",
        WARPS,
    ),
    Mutant(
        "spatial_attention",
        "chunks' sums merged without their maxima",
        "total += l * exponential(of.maximum(k, h) - m);",
        "total += l;",
        WARPS,
    ),
    Mutant(
        "spatial_attention",
        "only as many chunks as a warp has lanes",
        "for (int64_t k = lane; k < b.chunks; k += 32) { const float l = of.total(k, h);",
        "for (int64_t k = lane; k < least<int64_t>(b.chunks, 32); k += 32) { const float l = of.total(k, h);",
        "test_cuts.py -k many_chunks",
    ),
    Mutant(
        "spatial_attention",
        "text's gradient without the change of the mean",
        "u += b.sum(2, 0, c) + stats.shift[h] * b.sum(2, 1, c);",
        "u += b.sum(2, 0, c);",
        WARPS,
    ),
    Mutant(
        "spatial_attention",
        "a bag's last chunk forgotten",
        "chunks = most<int64_t>(ceil_div(count, t.chunk), 1);",
        "chunks = most<int64_t>(count / t.chunk, 1);",
        "test_cuts.py -k 'bags_begin and cuda-emulated and not additive'",
    ),
    Mutant(
        "spatial_attention",
        "no cluster barrier before the peers' means are read",
        "cluster_sync(); merge_means(",
        "merge_means(",
        "test_cuts.py -k 'many_heads and cluster'",
    ),
    Mutant(
        "gated_cross_attention",
        "only as many parts as a warp has lanes",
        "for (int64_t s = lane; s < t.splits; s += 32) total",
        "for (int64_t s = lane; s < least<int64_t>(t.splits, 32); s += 32) total",
        "test_cuts.py -k many_parts",
    ),
    Mutant(
        "gated_cross_attention",
        "no barrier of the warp before a resident tile's product",
        "if (resident) __syncwarp(); else __syncthreads();",
        "if (!resident) __syncthreads();",
        HEADS_WARPS,
    ),
    Mutant(
        "gated_cross_attention",
        "result not rescaled to the new maximum",
        "o[j][2 * half] *= before; o[j][2 * half + 1] *= before;",
        "o[j][2 * half] *= before;",
        HEADS_WARPS,
    ),
    Mutant(
        "gated_cross_attention",
        "one row too many takes part",
        "$valid[stage_index * S + r] = n + r < end && $taken(n + r);",
        "$valid[stage_index * S + r] = n + r <= end && $taken(n + r);",
        HEADS_WARPS,
    ),
    Mutant(
        "bidirectional_attention",
        "no barrier before the warps' maxima are read",
        "__syncthreads(); auto top = [&](int column)",
        "auto top = [&](int column)",
        HEADS_WARPS,
    ),
    Mutant(
        "bidirectional_attention",
        "one softmax's gradient overwrites the other's",
        "d += q == 1 ? 0.f :",
        "d = q == 1 ? 0.f :",
        HEADS_WARPS,
    ),
    Mutant(
        "bidirectional_attention",
        "gradients of the last part of the stream only",
        "sum[e] += x[e];",
        "sum[e] = x[e];",
        "test_cuts.py -k many_parts",
    ),
    Mutant(
        "channel_attention",
        "sign of the mean",
        "w * (arriving(c, $grad) - mean)",
        "w * (arriving(c, $grad) + mean)",
    ),
    Mutant(
        "channel_attention",
        "maximum and sum without the text",
        "own.add(load(scores + c) + load(shift + c));",
        "own.add(load(scores + c));",
    ),
    Mutant(
        "additive_attention",
        "sums of columns overwrite those of earlier panels",
        "store(t.to + b * t.C + c, load(t.to + b * t.C + c) + total);",
        "store(t.to + b * t.C + c, total);",
        ROWS,
    ),
    Mutant(
        "additive_attention",
        "a sample's last part not merged",
        "for (int64_t $split = 0; $split < t.splits; ++$split) total +=",
        "for (int64_t $split = 0; $split + 1 < t.splits; ++$split) total +=",
    ),
    Mutant(
        "additive_attention",
        "centred once",
        "load(x + r) - mean[0] - mean[1]",
        "load(x + r) - mean[0]",
        "test_cuts.py -k 'cancels and cuda-emulated'",
    ),
    Mutant(
        "gated_cross_attention",
        "gradient of the first head",
        "get<8>(g, head_of<T>(t.grad, b, h) +",
        "get<8>(g, head_of<T>(t.grad, b, 0) +",
    ),
    Mutant(
        "additive_attention",
        "a bag's first row taken for the bag's before",
        "load(s.offsets + middle) <= row ? low",
        "load(s.offsets + middle) < row ? low",
    ),
    Mutant(
        "additive_attention",
        "sums as wide as the image's numbers",
        "total += sum; } store(t.partial",
        "total = to_float(from_float<T>(total + sum)); } store(t.partial",
    ),
    Mutant(
        "additive_attention",
        "gradients' sums not cleared",
        "load(t.to + i) + load(t.from + i) : 0.f",
        "load(t.to + i) + load(t.from + i) : load(t.to + i)",
    ),
    Mutant(
        "channel_attention",
        "only as many channels as a warp has lanes",
        "for (int64_t c = row.lane; c < a.D; c += 32) store(to +",
        "for (int64_t c = row.lane; c < least<int64_t>(a.D, 32); c += 32) store(to +",
    ),
)
