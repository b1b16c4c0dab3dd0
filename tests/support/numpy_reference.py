"""Every operation in NumPy, written from its formula alone, position by position."""

import math

import numpy as np
import torch


def spatial_attention(
    image,
    text,
    mask=None,
    offsets=None,
    scale=None,
    num_heads=1,
    combine="multiply",
    rescale=False,
    layout="bnd",
    need_weights=False,
):
    """Position by position: w_n = exp(s_n) / sum_m exp(s_m) over the positions that take part, per head."""
    if offsets is not None:
        bags = [(slice(start, stop), b) for b, (start, stop) in enumerate(zip(offsets, offsets[1:]))]
        result = np.zeros(text.shape if combine == "pool" else image.shape)
        weights = np.zeros((num_heads, len(image)))
        for rows, b in bags:
            r, w = spatial_attention(
                image[None, rows],
                text[b : b + 1],
                None if mask is None else mask[None, rows],
                None,
                scale,
                num_heads,
                combine,
                rescale,
            )
            result[b if combine == "pool" else rows] = r[0]
            weights[:, rows] = w[0]
        return result, weights
    if layout == "bdhw":
        batch, channels, height, width = image.shape
        rows = np.moveaxis(image, 1, -1).reshape(batch, height * width, channels)
        result, weights = spatial_attention(
            rows, text, None if mask is None else mask.reshape(batch, -1), None, scale, num_heads, combine, rescale
        )
        if combine == "multiply":
            result = np.moveaxis(result.reshape(batch, height, width, channels), -1, 1)
        return result, weights

    batch, positions, channels = image.shape
    width = channels // num_heads
    scale = 1 / np.sqrt(channels / num_heads) if scale is None else scale
    result = np.zeros((batch, channels) if combine == "pool" else image.shape)
    weights = np.zeros((batch, num_heads, positions))
    for b in range(batch):
        part = [n for n in range(positions) if mask is None or mask[b, n]]
        if not part:
            continue
        for h in range(num_heads):
            own = slice(h * width, (h + 1) * width)
            scores = np.array([scale * np.dot(image[b, n, own], text[b, own]) for n in part])
            powers = np.exp(scores - scores.max())
            w = powers / powers.sum() * (len(part) if rescale else 1)
            weights[b, h, part] = w
            for n, w_n in zip(part, w):
                if combine == "pool":
                    result[b, own] += w_n * image[b, n, own]
                else:
                    result[b, n, own] = w_n * image[b, n, own]
    return result, weights


def softmax(scores, part):
    """One vector's, over where `part` holds; 0 elsewhere."""
    weights = np.zeros(len(scores))
    if part.any():
        powers = np.exp(scores[part] - scores[part].max())
        weights[part] = powers / powers.sum()
    return weights


def gated_cross_attention(query, key, value, gate=None, attn_mask=None, scale=None, need_weights=False):
    """Query by query: softmax over tokens of scale <q, k_t> (plus the mask), times the values, times the gate."""
    batch, heads, positions, width = query.shape
    tokens = key.shape[2]
    if attn_mask is None:
        attn_mask = np.ones((1, 1, 1, tokens), dtype=bool)
    if attn_mask.ndim == 2:
        attn_mask = attn_mask[:, None, None]
    attn_mask = np.broadcast_to(attn_mask, (batch, heads, positions, tokens))
    scale = 1 / np.sqrt(width) if scale is None else scale
    result = np.zeros((batch, heads, positions, value.shape[3]))
    weights = np.zeros(attn_mask.shape)
    for i in np.ndindex(batch, heads, positions):
        scores = np.array([scale * np.dot(query[i], k) for k in key[i[:2]]])
        mask = attn_mask[i]
        weights[i] = softmax(scores, mask) if mask.dtype == bool else softmax(scores + mask, mask > -np.inf)
        result[i] = sum((w * v for w, v in zip(weights[i], value[i[:2]])), np.zeros(value.shape[3]))
    return (result if gate is None else gate * result), weights


def bidirectional_attention(
    image_query, text_key, image_value, text_value, image_mask=None, text_mask=None, scale=None
):
    """Two attentions, each on its own."""
    widen = lambda mask: None if mask is None else mask[:, None, None]
    image_out, _ = gated_cross_attention(image_query, text_key, text_value, attn_mask=widen(text_mask), scale=scale)
    text_out, _ = gated_cross_attention(text_key, image_query, image_value, attn_mask=widen(image_mask), scale=scale)
    return image_out, text_out


def absorbed_attention(image, key, value=None, key_bias=None, image_mask=None, text_mask=None, pool=True):
    """Every head is an attention of its own, in which the bias is a further channel; the image's results add up."""
    heads, tokens = key.shape[1:3]
    bias = np.zeros(key.shape[:3]) if key_bias is None else key_bias
    wide = np.concatenate(
        [
            np.broadcast_to(image[:, None], (len(image), heads, *image.shape[1:])),
            np.ones((len(image), heads, image.shape[1], 1)),
        ],
        3,
    )
    keys = np.concatenate([key, bias[..., None]], 3)
    image_out, text_out = bidirectional_attention(
        wide,
        keys,
        wide[..., :-1],
        np.zeros((*key.shape[:3], 1)) if value is None else value,
        image_mask,
        text_mask,
        1.0,
    )
    return tuple(r for r in (None if value is None else image_out.sum(1), text_out if pool else None) if r is not None)


def over_all(scores):
    return softmax(scores, np.ones(len(scores), dtype=bool))


def deformable_attention(value, spatial_shapes, locations, scores, points=None, mask=None, softmax=True):
    """Sample by sample, from the hat function: a position's share is (1 - |x - its column|) (1 - |y - its row|)."""
    value = value if mask is None else np.where(mask[:, :, None, None], value, 0)
    shapes = [tuple(int(n) for n in shape) for shape in spatial_shapes]
    if points is None:
        points = [locations.shape[4]] * len(shapes)
        locations = locations.reshape(*locations.shape[:3], sum(points), 2)
        scores = scores.reshape(*scores.shape[:3], sum(points))
    begins = np.cumsum([0, *(y * x for y, x in shapes)])
    level = np.repeat(np.arange(len(shapes)), points)
    batch, queries, heads = scores.shape[:3]
    result = np.zeros((batch, queries, heads, value.shape[3]))
    for b, q, h in np.ndindex(batch, queries, heads):
        given = scores[b, q, h]
        weights = over_all(given) if softmax else given
        for k, weight in enumerate(weights):
            height, width = shapes[level[k]]
            x, y = locations[b, q, h, k] * (width, height) - 0.5
            if not np.isfinite([x, y]).all():
                continue
            rows, columns = np.arange(height), np.arange(width)
            share = np.outer(np.maximum(0, 1 - abs(y - rows)), np.maximum(0, 1 - abs(x - columns)))
            plane = value[b, begins[level[k]] : begins[level[k] + 1], h]
            result[b, q, h] += weight * (share.reshape(-1) @ plane)
    return (result.reshape(batch, queries, heads * value.shape[3]),)


def channel_attention(image, text, weight, bias=None, need_weights=False):
    """Position by position: softmax(W [x, y] + b), over channels."""
    weights = np.zeros(image.shape)
    for i in np.ndindex(image.shape[:-1]):
        scores = weight @ np.concatenate([image[i], text[i[0]]]) + (0 if bias is None else bias)
        weights[i] = softmax(scores, np.ones(len(scores), dtype=bool))
    return image * weights, weights


def dropout(seed, row, units, which, p):
    """What a row's units are multiplied with: unit by unit, a word of Philox4x32-10 (Salmon et al. 2011)."""
    if not p:
        return np.ones(units)
    quarter = (units + 3) // 4
    factors = np.zeros(units)
    for unit in range(units if p < 1 else 0):
        a, b, c, d = unit % quarter, int(row) % 2**32, int(row) >> 32, which
        k, l = seed % 2**32, seed >> 32
        for _ in range(10):
            left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
            a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ l, left % 2**32
            k, l = (k + 0x9E3779B9) % 2**32, (l + 0xBB67AE85) % 2**32
        factors[unit] = 0 if (a, b, c, d)[unit // quarter] < int(p * 2**32) else 1 / (1 - p)
    return factors


def additive_attention(
    image,
    query,
    w_image,
    w_query,
    v,
    bias=None,
    w_gate=None,
    bias_gate=None,
    activation="tanh",
    mask=None,
    offsets=None,
    combine="pool",
    dropout_p=0.0,
    need_weights=False,
    need_scores=False,
):
    """Position by position: the score of each map, v_k . h."""
    act = {
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0),
        "gelu": lambda x: x * np.vectorize(lambda y: 0.5 * math.erfc(-y / math.sqrt(2)))(x),
    }[activation]
    bags = (
        [image[b] for b in range(len(image))]
        if offsets is None
        else [image[start:stop] for start, stop in zip(offsets, offsets[1:])]
    )
    masks = (
        [None] * len(bags)
        if mask is None
        else list(mask)
        if offsets is None
        else [mask[start:stop] for start, stop in zip(offsets, offsets[1:])]
    )
    results, weights, all_scores = [], [], []
    seed = int(torch.randint(2**63 - 1, ())) if dropout_p else None
    row = 0
    for b, (rows, part) in enumerate(zip(bags, masks)):
        part = np.ones(len(rows), dtype=bool) if part is None else part
        scores = np.zeros((len(v), len(rows)))
        for n in np.flatnonzero(part):
            keep, keep_gate = (dropout(seed, row + n, len(w_image), which, dropout_p) for which in (0, 1))
            u = w_image @ rows[n] + (0 if query is None else w_query @ query[b]) + (0 if bias is None else bias)
            t = None if w_gate is None else w_gate @ rows[n] + (0 if bias_gate is None else bias_gate)
            scores[:, n] = v @ (act(u) * keep if t is None else act(u) * keep * (keep_gate / (1 + np.exp(-t))))
        w = np.array([softmax(s, part) for s in scores]).reshape(scores.shape)
        kept = np.where(part[:, None], rows, 0)
        results.append(w @ kept if combine == "pool" else w.T * kept)
        weights.append(w)
        row += len(rows)
        all_scores.append(np.where(part, scores, -np.inf))
    if offsets is None:
        shape = (0, len(v), image.shape[2]) if combine == "pool" else image.shape
        of_positions = [np.stack(t) if bags else np.zeros((0, len(v), image.shape[1])) for t in (weights, all_scores)]
        return np.stack(results) if bags else np.zeros(shape), *of_positions
    result = (
        np.stack(results)
        if bags and combine == "pool"
        else np.concatenate(results)
        if bags
        else np.zeros((0, len(v), image.shape[1]))
    )
    return result, *(np.concatenate(t, 1) if bags else np.zeros((len(v), 0)) for t in (weights, all_scores))
