"""Dropout whose numbers are a function of where they are: nothing is stored for the backward pass, and every backend
draws the same (csrc/dropout.h).

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (doi 10.1145/2063384.2063405).
"""

import torch

HIDDEN, GATE = range(2)  # which numbers: those of the activated hidden vector, or of the gate
_WORD = 2**32 - 1


def draw_seed(device):
    """From torch's generator of the device, where it stays: nothing waits for it."""
    return torch.randint(2**63 - 1, (), device=device)


def dropout_factors(seed, shape, hidden, which, p, dtype):
    """``[*shape, hidden]`` for rows of that shape: 0 where an element is dropped, else ``1 / (1 - p)``.

    Rows count from 0, over samples and their positions, or over packed rows. Hidden unit u of row r takes word
    ``u // quarter`` of Philox4x32-10's counter ``(u % quarter, r, which)``, where ``quarter`` is a fourth of the units,
    rounded up. The key is the seed.
    """
    row = torch.arange(torch.Size(shape).numel(), device=seed.device).view(*shape, 1)
    unit = torch.arange(-(-hidden // 4), device=seed.device)
    words = torch.cat(philox((unit, row & _WORD, row >> 32, which), (seed & _WORD, seed >> 32 & _WORD)), -1)
    kept = words[..., :hidden] >= threshold(p)
    return kept.to(dtype) * scale(p)


def threshold(p):
    """Words below it are dropped."""
    return min(int(p * 2**32), _WORD)


def scale(p):
    """Of what stays; with p = 1 nothing does."""
    return 1 / (1 - p) if p < 1 else 0.0


def philox(counter, key):
    """The four words of Philox4x32-10, numbers of 32 bits in int64, of a counter of four and a key of two."""
    a, b, c, d = counter
    k, l = key
    for _ in range(10):
        p = a * 0xD2511F53  # 64 bits: what int64 takes for the sign is the highest of them
        q = c * 0xCD9E8D57
        a = q >> 32 & _WORD ^ b ^ k
        c = p >> 32 & _WORD ^ d ^ l
        b = q & _WORD
        d = p & _WORD
        k = k + 0x9E3779B9 & _WORD
        l = l + 0xBB67AE85 & _WORD
    return a, b, c, d
