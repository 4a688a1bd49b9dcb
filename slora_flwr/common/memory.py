"""The memory that a process has freed, and how it gets back to the system."""

import ctypes
import sys
from functools import cache

# Of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_KEPT = 2**30
# Older versions than 2.35 take no threshold of blocks above this.
_MOST_OF_OLDER = 2**25


@cache
def keep_freed() -> None:
    """Have the C library keep freed memory, until `return_freed`.

    glibc returns large blocks, and fetches them again in the next step: each page costs
    a fault, all of them a fifteenth of a training step of MiniLM's.
    """
    if sys.platform == "linux":
        change = getattr(ctypes.CDLL(None), "mallopt", None)
        # Setting either ends glibc's own adjustment of both.
        if change is not None and (
            change(_MMAP_THRESHOLD, _MOST_KEPT)
            or change(_MMAP_THRESHOLD, _MOST_OF_OLDER)
        ):
            change(_TRIM_THRESHOLD, _MOST_KEPT)


def return_freed() -> None:
    """Return freed memory to the system, where the C library can.

    glibc keeps what lies between blocks in use. A phase frees many blocks of the size
    of a state, and the next phase's have other sizes.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
