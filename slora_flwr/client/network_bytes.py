"""Bytes on the wire: what the network interface of a node has counted."""

from pathlib import Path


def count_wire(interface: str) -> list[int]:
    """Return the bytes received and sent so far, as Linux counts them.

    Parameters
    ----------
    interface : str
        `wire-interface` of the node config, such as `eth0`; empty to count nothing.

    Raises
    ------
    ValueError
        If there is no such interface.
    """
    if not interface:
        return []
    # Compared with the folder's names, so that a name cannot lead elsewhere.
    found = {path.name: path for path in Path("/sys/class/net").glob("*")}
    if interface not in found:
        raise ValueError(
            f"wire-interface in the node config is {interface!r}; allowed: "
            f"{', '.join(sorted(found)) or 'none here'}, or empty"
        )
    counts = found[interface] / "statistics"
    return [
        int((counts / f"{way}_bytes").read_text(encoding="utf-8"))
        for way in ("rx", "tx")
    ]
