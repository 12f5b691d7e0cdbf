"""The random numbers of sampling: counter-based, so that a replay on another replica draws the same tokens.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11). The mapping is fixed:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (token id, position, choice, 0)
    x       = first output word
    v       = min((x + 1/2) / 2^32, 1 - 2^-24)            in fp32
    E       = v (1 + v/2 + v^2/3) if v < 2^-8 else -ln(1 - v)
    draw    = argmax over allowed tokens of logit / temperature - ln E        (Gumbel-max)

`position` is the index in the sequence (prompt included) of the token that is drawn. E is exponential with mean 1;
small v, where the winners are, keeps its full relative precision. This file is the executable definition; the fast
paths in `kernels.sampling` are tested against it.
"""

from __future__ import annotations

import math
import struct

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

Words = tuple[int, int, int, int]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds of Philox on four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _fp32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def exponential(seed: int, choice: int, position: int, token_id: int) -> float:
    """E of the mapping above for one token (fp32 steps, as a Python float)."""
    word = philox4x32((token_id, position, choice, 0), (seed & _MASK, seed >> 32 & _MASK))[0]
    v = min(_fp32(_fp32(word + 0.5) * 2.0**-32), 1.0 - 2.0**-24)
    return v * (1.0 + v * (0.5 + v / 3.0)) if v < 2.0**-8 else -math.log(1.0 - v)
