"""The content of pages: a digest names a page's tokens and all tokens before them.

Keys and values of a token follow from all tokens up to it. So the digest of a full page is taken of
its tokens and of the digest of the page before; that of the first page, of the sequence's salt.
"""

import hashlib

import numpy as np
import numpy.typing as npt

CacheSalt = str | bytes | int | None


def root(cache_salt: CacheSalt, epoch: int) -> bytes:
    """Begin a chain of digests. Sequences of other salts and epochs share nothing with it."""
    match cache_salt:  # by the types' own functions: a subclass may print all its values alike
        case None:
            text = "None"
        case str():
            text = str.__repr__(cache_salt)
        case bytes():
            text = bytes.__repr__(cache_salt)
        case int():
            text = int.__repr__(cache_salt)
        case _:
            raise TypeError(f"cache_salt={cache_salt!r:.80} must be a str, bytes, an int or None")
    # The digest of 32 bytes: no page's is of so few, so that no salt passes for a page.
    return digest(hashlib.sha256(f"{epoch} {text}".encode()).digest(), b"")


def digest(before: bytes, page: bytes) -> bytes:
    """Return the digest of a page's tokens, which follow what `before` is the digest of."""
    return hashlib.sha256(before + page).digest()


def chain(first: bytes, tokens: npt.NDArray[np.int32], page_size: int) -> list[bytes]:
    """Return `first` and the digests of all full pages of the tokens."""
    digests, raw, step = [first], tokens.tobytes(), page_size * tokens.itemsize
    for end in range(step, len(raw) + 1, step):
        digests.append(digest(digests[-1], raw[end - step : end]))
    return digests
