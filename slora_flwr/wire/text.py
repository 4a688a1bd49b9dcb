"""Text that came over the network, on its way into logs, events and pages."""

from slora_flwr.redact import redact


def printable(text: object, most: int = 300) -> str:
    """Make a text one line without control characters or passwords, cut to a length."""
    whole = redact(text)
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in whole[:most])
    more = f"… ({len(whole)} characters)" if len(whole) > most else ""
    return "".join(shown) + more
