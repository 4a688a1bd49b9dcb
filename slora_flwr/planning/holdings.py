"""Who has which version of a phase's base, and the bytes that lead to the last."""

from slora_flwr.runs.snapshot import Snapshot


class Holdings:
    """Bytes of a base's versions, and who has which.

    Parameters
    ----------
    start : int
        Bytes of the first version, 0 for W_0.
    most : int
        Bytes of all target matrices, which go in place of more moves than that.
    """

    def __init__(self, start: int, most: int) -> None:
        self.start, self.most = start, most
        self.moves: list[int] = []
        self._held: dict[int, int] = {}

    def update(self, holder: int) -> int | None:
        """Note that somebody gets the current version; give the one it had."""
        version = self._held.get(holder)
        self._held[holder] = len(self.moves)
        return version

    def cost(self, version: int | None) -> int:
        """Count the bytes that lead from a version, None for nothing, to the last."""
        start = self.start if version is None else 0
        return start + sum(self.moves[version or 0 :])

    def is_whole(self, version: int | None) -> bool:
        """Tell whether the matrices themselves cost less than that."""
        return bool(self.moves) and self.cost(version) > self.most

    def owed(self, holder: int) -> int:
        """Count the bytes of what somebody lacks, and note that it gets them."""
        version = self.update(holder)
        return self.most if self.is_whole(version) else self.cost(version)

    def snapshot(self) -> Snapshot:
        """Give what `restore` takes."""
        held = [*self._held.items()]
        return Snapshot({"start": self.start, "moves": self.moves, "held": held})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from there."""
        facts = snapshot.facts
        self.start, self.moves = facts["start"], facts["moves"]
        self._held = dict(facts["held"])
