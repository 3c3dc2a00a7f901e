"""Seeds from names: every draw has one of its own, so that one more draw or another order moves no other.

The names are joined by ``/`` and hashed; the seed is the start of the sha256 digest. Every room may use it.
"""

from __future__ import annotations

import hashlib

__all__ = ["seed_of"]


def seed_of(*names: object, width: int = 7) -> int:
    """Return a seed that is a function of the names alone.

    Args:
        names: what the draw is for, as texts or numbers.
        width: bytes of the digest that make the seed; 7 fit into torch's signed 64-bit seeds.

    Returns:
        An integer in [0, 256**width).
    """
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:width], "big")
