"""Masks: numbers of the ring, uniform to all who lack their key."""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

# Bytes made at once, so that they stay in a core's cache.
_BLOCK = 2**18
_ZEROS = bytes(_BLOCK)


def add_mask(
    arrays: tuple[NDArray[np.unsignedinteger], ...], key: bytes, sign: int
) -> None:
    """Add the mask of a key to arrays in place, or take it away.

    The mask is ChaCha20's key stream (RFC 8439), read as numbers of the arrays' types,
    one array after another.

    Parameters
    ----------
    arrays : tuple of NDArray
        Numbers of rings, each modulo 2^bits of its type.
    key : bytes
        32 bytes, used for one mask alone: the stream begins at a nonce of zeros.
    sign : int
        1 to add, -1 to take away.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    block = bytearray(_BLOCK)
    combine = np.add if sign > 0 else np.subtract
    for array in arrays:
        for start in range(0, len(array), _BLOCK // array.itemsize):
            part = array[start : start + _BLOCK // array.itemsize]
            stream.update_into(_ZEROS[: part.nbytes], block)
            combine(part, np.frombuffer(block, array.dtype, len(part)), out=part)
