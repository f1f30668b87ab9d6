"""Which text is held out of the datastore, to calibrate and verify it on."""

from __future__ import annotations

import hashlib

from knnlm_core.errors import InvalidParameter


def is_candidate(document_digest: bytes, fraction: float, seed: int) -> bool:
    """Decide whether a document may be held out, from its content alone.

    sha256(seed ‖ digest), its first 8 bytes read as an integer u: held out if u / 2⁶⁴ < fraction. So the answer
    depends neither on the order of the documents nor on their number, each is chosen with probability ``fraction``,
    and those chosen at a fraction are among those chosen at any larger one with the same seed.

    Args:
        document_digest: 32 bytes, as from `SourceDocument.digest`.
        fraction: 0 … 1.
        seed: a signed 64-bit integer.

    Raises: InvalidParameter: a fraction, seed or digest that is none.
    """
    _check_fraction(fraction)
    if not -(2**63) <= seed < 2**63:
        raise InvalidParameter(f"`seed` must be a signed 64-bit integer, got {seed}", param="seed")
    if len(document_digest) != 32:
        raise InvalidParameter(
            f"`document_digest` must have 32 bytes, got {len(document_digest)}", param="document_digest"
        )
    drawn = hashlib.sha256(seed.to_bytes(8, "little", signed=True) + document_digest).digest()
    # Multiplying by a power of two is exact in floating point, so 1 − 2⁻⁵³ is told from 1.
    return int.from_bytes(drawn[:8], "little") < int(fraction * 2**64)


def split_tail(num_tokens: int, fraction: float) -> int:
    """Where the held-out tail of a document starts: for a corpus of too few documents to hold whole ones out.

    The tail ``[position, num_tokens)`` has ⌊num_tokens · fraction⌋ tokens.

    Raises: InvalidParameter: a negative length, or a fraction outside 0 … 1.
    """
    _check_fraction(fraction)
    if num_tokens < 0:
        raise InvalidParameter(f"`num_tokens` must be at least 0, got {num_tokens}", param="num_tokens")
    return num_tokens - int(num_tokens * fraction)


def _check_fraction(fraction: float) -> None:
    if not 0.0 <= fraction <= 1.0:  # false for NaN too
        raise InvalidParameter(f"`fraction` must be in 0 … 1, got {fraction}", param="fraction")
