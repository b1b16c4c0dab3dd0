"""Mutants of the CPU's kernels."""

from mutant import Mutant

MUTANTS = (
    Mutant(
        "spatial_attention",
        "pooled sums of chunks overwrite each other",
        "total[d] += factor * pooled[d];",
        "total[d] = factor * pooled[d];",
    ),
    Mutant(
        "spatial_attention",
        "backward merge without the change of the mean",
        "total[d] += u[d] + shift * v[d];",
        "total[d] += u[d];",
    ),
    Mutant(
        "spatial_attention",
        "sign of the change of the mean",
        "add_scaled(dsh, wh, count, means.data[",
        "add_scaled(dsh, wh, count, -means.data[",
    ),
    Mutant(
        "spatial_attention",
        "mean of the last run only",
        "mean[h] += product_sum(wh, dwh, count);",
        "mean[h] = product_sum(wh, dwh, count);",
    ),
    Mutant(
        "spatial_attention",
        "maximum without the tail of the vector loop",
        "for (; i < count; ++i) m = maximum(m, s[i]);",
        "",
    ),
    Mutant(
        "spatial_attention",
        "sum without the tail of the vector loop",
        "s[j] = rest[j - i]; total += rest;",
        "s[j] = rest[j - i];",
    ),
    Mutant(
        "spatial_attention",
        "chunks' sums merged without their maxima",
        "total += sums[k * step] * maxima[k * step];",
        "total += sums[k * step];",
    ),
    Mutant(
        "spatial_attention",
        "wrong stride of the mask",
        "keep + y * mask.y + x * mask.x",
        "keep + y * mask.x + x * mask.x",
    ),
    Mutant(
        "additive_attention",
        "sum not rescaled to the new maximum",
        "total[k] *= factor;",
        "",
    ),
    Mutant(
        "additive_attention",
        "parts of a sample merged without their maxima",
        "total[k] += other.total[k] * factor;",
        "total[k] += other.total[k];",
        "test_additive_attention.py -k cpu-cpu-float32",
    ),
    Mutant(
        "additive_attention",
        "centred once",
        "w[n] * ((ds[n] - first) - second)",
        "w[n] * (ds[n] - first)",
        "test_cuts.py -k 'cancels and cpu-cpu'",
    ),
    Mutant(
        "channel_attention",
        "mean dropped in the vector loop",
        "load(up + c) * load(x + c) - weight * total",
        "load(up + c) * load(x + c)",
    ),
    Mutant(
        "channel_attention",
        "sum overwritten in the tail of the vector loop",
        "total += (up[c] *= p[c] * share) * x[c];",
        "total = (up[c] *= p[c] * share) * x[c];",
    ),
    Mutant(
        "gated_cross_attention",
        "sums not rescaled from block to block of tokens",
        "if (k) scale_rows(sums.data, count, value_width, a.dv, factor.data); gemm_tile<C, true>(",
        "gemm_tile<C, true>(",
    ),
    Mutant(
        "gated_cross_attention",
        "key of the first head",
        "key = head<T>(a.key, b, h);",
        "key = head<T>(a.key, b, 0);",
    ),
    Mutant(
        "bidirectional_attention",
        "text's sums not rescaled from tile to tile",
        "scale_rows(of_text.values + t * value_width, n, value_width, a.dv, column_factor.data);",
        "",
    ),
    Mutant(
        "bidirectional_attention",
        "text attends to masked positions",
        "[&](int64_t r) { return in.keeps(first + r); }, of_text.top + t",
        "[](int64_t) { return true; }, of_text.top + t",
    ),
)
