"""The bytes that bring each holder of a phase's base to its current version."""

from slora_flwr.runs.snapshot import Snapshot


class VersionBytes:
    """Bytes of a base's versions, and the version that each holder has.

    Parameters
    ----------
    start : int
        Bytes of the first version, 0 for W_0.
    most : int
        Bytes of all target matrices, which are sent if the changes take more.
    """

    def __init__(self, start: int, most: int) -> None:
        self.start, self.most = start, most
        self.changes: list[int] = []
        self._held: dict[int, int] = {}

    def update(self, holder: int) -> int | None:
        """Record that a holder gets the current version; return the one it had."""
        version = self._held.get(holder)
        self._held[holder] = len(self.changes)
        return version

    def cost(self, version: int | None) -> int:
        """Return the bytes of the changes since a version; None for no version."""
        start = self.start if version is None else 0
        return start + sum(self.changes[version or 0 :])

    def is_whole(self, version: int | None) -> bool:
        """Return whether the matrices take fewer bytes than the changes."""
        return bool(self.changes) and self.cost(version) > self.most

    def bytes_due(self, holder: int) -> int:
        """Return the bytes of what a holder lacks, and record that it gets them."""
        version = self.update(holder)
        return self.most if self.is_whole(version) else self.cost(version)

    def snapshot(self) -> Snapshot:
        """Return a snapshot for `restore`."""
        held = [*self._held.items()]
        return Snapshot({"start": self.start, "changes": self.changes, "held": held})

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the versions and holders of a snapshot."""
        facts = snapshot.facts
        self.start, self.changes = facts["start"], facts["changes"]
        self._held = dict(facts["held"])
