"""The base that a phase's adapter stands on, and who has which version of it."""

from collections.abc import Callable, Hashable
from hashlib import blake2b

from flwr.app import Array

from slora_flwr.models.base_patch import BasePatch
from slora_flwr.wire.messages import Parcel
from slora_flwr.wire.packing import pack


class Base:
    """Versions of a base: the phase's start, then one after each round that moves it.

    Versions are named by a digest of the start and of all moves, so that whoever has
    one knows it, however it came by it.

    Parameters
    ----------
    patch : BasePatch or None
        The start; None, or one that is empty, for W_0.
    size : int
        Bytes of all target matrices: what more moves than that would cost.
    weights : Callable
        Packs the target matrices of the current version.
    """

    def __init__(
        self, patch: BasePatch | None, size: int, weights: Callable[[], Array]
    ) -> None:
        self.patch = patch
        state = patch.state() if patch is not None else {}
        self._start = pack(state) if state else None
        self._digests = [_digest(self._start.data) if self._start else ""]
        self._moves: list[Array] = []
        self._sizes: list[int] = []
        self._size, self._weights = size, weights
        self._held: dict[Hashable, int] = {}

    @property
    def digest(self) -> str:
        """Names the current version; empty for W_0."""
        return self._digests[-1]

    def move(self, move: Array) -> None:
        """Go on to the next version."""
        self._digests.append(_digest(self.digest.encode(), move.data))
        self._moves.append(move)
        self._sizes.append(len(move.data))
        # Whoever lacks more than the matrices' size gets these instead.
        for i, _ in enumerate(self._moves):
            if sum(self._sizes[i:]) <= self._size:
                break
            self._moves[i] = _NO_MOVE

    def owed(self, holder: Hashable) -> int:
        """Count the bytes of what somebody lacks, and note that it gets them."""
        version = self._held.get(holder)
        self._held[holder] = len(self._moves)
        moved = sum(self._sizes[version or 0 :])
        if moved > self._size:
            return self._size
        start = len(self._start.data) if self._start and version is None else 0
        return start + moved

    def parcel(self, holder: Hashable, *, anew: bool = False) -> Parcel:
        """Give what a node lacks, and note that it gets it.

        Parameters
        ----------
        holder : Hashable
            The node.
        anew : bool
            It lost what it had.
        """
        version = None if anew else self._held.get(holder)
        self._held[holder] = len(self._moves)
        moved = sum(self._sizes[version or 0 :])
        if moved > self._size:
            return Parcel(weights=self._weights())
        start = self._start if version is None else None
        begun = version or 0
        return Parcel(self._digests[begun], begun, start, self._moves[begun:])


_NO_MOVE = pack({})


def _digest(*parts: bytes) -> str:
    return blake2b(b"".join(parts), digest_size=16).hexdigest()
