"""The memory that a process has freed, and how it gets back to the system."""

import ctypes
import sys


def return_freed() -> None:
    """Return freed memory to the system, where the C library can.

    glibc keeps what lies between blocks in use. A phase frees many blocks of the size
    of a state, and the next phase's have other sizes.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
