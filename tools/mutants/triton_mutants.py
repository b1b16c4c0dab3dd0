"""Mutants of the Triton kernels; Triton's interpreter runs them."""

from mutant import Mutant

BAGS = "test_cuts.py -k 'bags_begin and triton and not additive'"
CHUNKS = "test_cuts.py -k 'triton and many_chunks'"
ABSORBED = "test_conformance.py -k 'result_alone and absorbed and triton'"

DROPOUT = "test_additive_attention.py -k 'dropout and triton'"

MUTANTS = (
    Mutant(
        "spatial_attention",
        "a bag's chunks counted from its length",
        "k1 = k0 + (last - 1) // a.s.chunk - first // a.s.chunk + 1 m = ",
        "k1 = k0 + tl.cdiv(last - first, a.s.chunk)\n    m = ",
        BAGS,
    ),
    Mutant(
        "spatial_attention",
        "a bag's chunks counted from its length, backward",
        "k1 = k0 + (last - 1) // a.s.chunk - first // a.s.chunk + 1 weighted = ",
        "k1 = k0 + tl.cdiv(last - first, a.s.chunk)\n    weighted = ",
        BAGS,
    ),
    Mutant(
        "spatial_attention",
        "sum not rescaled to the new maximum",
        "total = total * fade + tl.sum(e, 0)",
        "total = total + tl.sum(e, 0)",
        CHUNKS,
    ),
    Mutant(
        "spatial_attention",
        "pooled sums not rescaled to the new maximum",
        "sums = sums * fade + tl.sum(e[:, None] * x, 0)",
        "sums = sums + tl.sum(e[:, None] * x, 0)",
        CHUNKS,
    ),
    Mutant(
        "spatial_attention",
        "positions of the last chunks only",
        "count += tl.sum(tl.load(at + 2 * programs, k < k1, 0), 0)",
        "count = tl.sum(tl.load(at + 2 * programs, k < k1, 0), 0)",
        CHUNKS,
    ),
    Mutant(
        "spatial_attention",
        "text's gradient without the change of the mean",
        "u += (mean - new) * v + tl.sum(",
        "u += tl.sum(",
        CHUNKS,
    ),
    Mutant(
        "spatial_attention",
        "mask not looked at",
        "valid = valid & (tl.load(rows(a, a.mask, b, n), valid, 0) != 0)",
        "valid = valid",
        CHUNKS,
    ),
    Mutant(
        "gated_cross_attention",
        "result not rescaled to the new maximum",
        "acc = tl.dot(p.to(DOT), v, acc * fade[:, None], input_precision=PRECISION) m = new if partial",
        "acc = tl.dot(p.to(DOT), v, acc, input_precision=PRECISION)\n        m = new\n    if partial",
    ),
    Mutant(
        "gated_cross_attention",
        "parts merged by the wrong maximum",
        "weight = tl.exp(own - finite(new))",
        "weight = tl.exp(m - finite(new))",
    ),
    Mutant(
        "gated_cross_attention",
        "gradients of the last part only",
        "total += tl.load(at, (n < size)",
        "total = tl.load(at, (n < size)",
    ),
    Mutant(
        "gated_cross_attention",
        "sign of delta",
        "row_delta = mean(p, dp, 1) ds += p * (dp - row_delta[:, None])",
        "row_delta = mean(p, dp, 1)\n            ds += p * (dp + row_delta[:, None])",
    ),
    Mutant(
        "bidirectional_attention",
        "text's share dropped",
        "p * (dp - col_delta[None, :]) * spread(col_share)[None, :] if to_value",
        "p * (dp - col_delta[None, :])\n            if to_value",
    ),
    Mutant(
        "channel_attention",
        "mean dropped",
        "p * (dp - mean[:, None])",
        "p * dp",
    ),
    Mutant(
        "channel_attention",
        "mean of the last channels only",
        "mean += tl.sum(p * dp, 1)",
        "mean = tl.sum(p * dp, 1)",
        "test_triton_rows.py -k wide_channels",
    ),
    Mutant(
        "additive_attention",
        "sum not rescaled to the new maximum",
        "total = total * tl.exp(m - base) + tl.sum(tl.exp(x - base), 0)",
        "total = total + tl.sum(tl.exp(x - base), 0)",
        "test_cuts.py -k 'that_rise and additive and triton'",
    ),
    Mutant(
        "additive_attention",
        "centred once",
        "- mean - rest",
        "- mean",
        "test_cuts.py -k 'cancels and triton'",
    ),
    Mutant(
        "additive_attention",
        "gate's slope without 1 - s",
        "dh * y * s * rest",
        "dh * y * s",
    ),
    Mutant(
        "additive_attention",
        "wrong stride from map to map",
        "at += weights.k",
        "at += weights.b",
    ),
    Mutant(
        "additive_attention",
        "a piece's last row forgotten",
        "tl.minimum(first + size, end)",
        "tl.minimum(first + size, end - 1)",
    ),
    Mutant(
        "gated_cross_attention",
        "gradient without the scale",
        "store_tile(to_query, dq * scale,",
        "store_tile(to_query, dq,",
    ),
    Mutant(
        "gated_cross_attention",
        "places counted in 32 bits",
        "n.to(tl.int64)[:, None] * x.n",
        "n[:, None] * x.n",
        "test_gated_cross_attention.py -k 'far_apart and triton'",
    ),
    Mutant(
        "gated_cross_attention",
        "sums as wide as the image's numbers",
        "acc = tl.dot(p.to(DOT), v, acc * fade[:, None], input_precision=PRECISION) m = new if partial",
        "acc = tl.dot(p.to(DOT), v, (acc * fade[:, None]).to(cols.value.data.dtype.element_ty).to(tl.float32), "
        "input_precision=PRECISION)\n"
        "        m = new\n    if partial",
        "test_cuts.py -k 'long_sums and gated and triton'",
    ),
    Mutant(
        "bidirectional_attention",
        "parts' sums where one head alone would have them",
        "((head * splits + split) * size + n)[:, None] * C",
        "((head + split) * size + n)[:, None] * C",
        "test_cuts.py -k 'several_heads and bidirectional and triton'",
    ),
    Mutant(
        "spatial_attention",
        "the last bag's last row forgotten",
        "tl.minimum(tl.load(a.offsets + b + 1), a.s.N), first)",
        "tl.minimum(tl.load(a.offsets + b + 1), a.s.N - 1), first)",
        BAGS,
    ),
    Mutant(
        "channel_attention",
        "bias of the first sample",
        "bias_hidden + sample[:, None].to(tl.int64) * C",
        "bias_hidden + 0 * sample[:, None].to(tl.int64) * C",
    ),
    Mutant(
        "channel_attention",
        "scores overwritten before all have read them",
        "all_have_read() tl.store(scores + at,",
        "tl.store(scores + at,",
        "test_triton_races.py -k channel_attention",
    ),
    Mutant(
        "absorbed_attention",
        "result of the last head only",
        "out += tl.where((total != 0)[:, None],",
        "out = tl.where((total != 0)[:, None],",
        ABSORBED,
    ),
    Mutant(
        "absorbed_attention",
        "a head's sums not rescaled to the new maximum",
        "acc = tl.dot(p.to(DOT), v, acc * fade[:, None], input_precision=PRECISION) m = new share",
        "acc = tl.dot(p.to(DOT), v, acc, input_precision=PRECISION)\n            m = new\n        share",
        "test_cuts.py -k 'that_rise and absorbed and triton'",
    ),
    Mutant(
        "absorbed_attention",
        "image's gradient without its own part in the pooled features",
        "dx = tl.dot((p * col_share[None, :]).to(DOT), g, dx, input_precision=PRECISION)",
        "dx += 0 * tl.dot((p * col_share[None, :]).to(DOT), g, dx, input_precision=PRECISION)",
        ABSORBED,
    ),
    Mutant(
        "absorbed_attention",
        "text's gradient without the mean",
        "dp - col_delta[None, :]) * spread(col_share)[None, :] db",
        "dp - 0 * col_delta[None, :]) * spread(col_share)[None, :]\n                db",
        ABSORBED,
    ),
    Mutant(
        "deformable_attention",
        "a position's cells above taken from another row",
        "cell - below * (width + 1) - right",
        "cell - below * width - right",
        "test_deformable_attention.py -k 'twice and triton'",
    ),
    Mutant(
        "deformable_attention",
        "what is left of the first column isn't near",
        "near = (x >= -1.0) &",
        "near = (x >= 0.0) &",
    ),
    Mutant(
        "deformable_attention",
        "mean of the last block of points only",
        "mean += tl.sum(weight * of_weight, 1)[:, None]",
        "mean = tl.sum(weight * of_weight, 1)[:, None]",
        "test_deformable_attention.py -k 'points and many and triton'",
    ),
    Mutant(
        "additive_attention",
        "rows' numbers counted from the panel's first",
        "row = (dropout.first + r)[:, None]",
        "row = r[:, None]",
        "test_triton_rows.py -k additive_panels",
    ),
    Mutant(
        "additive_attention",
        "backward's gates are dropped where hidden units are",
        "factors = factors_of(words, words_of_gate, w, dropout) differentiate_tile(",
        "factors = factors_of(words, words, w, dropout)\n            differentiate_tile(",
        DROPOUT,
    ),
    Mutant("additive_attention", "slope of what was dropped", "slope *= factors[0]", "slope *= 1.0", DROPOUT),
)
