"""Text from other libraries and machines, made printable and free of passwords."""

import logging
import re

# The user and password of an address; and its query, which may hold a signature. Both
# patterns run in linear time, since the text may be hostile.
_USER = re.compile(r"(?<=://)[^\s/?#'\"]*@")
_QUERY = re.compile(r"(://[^\s?#'\"]*)(\?[^\s#'\"]+)?")


def redact(text: object) -> str:
    """Return a text with users, passwords and queries removed from its addresses.

    The Hub's libraries quote the addresses that they requested, which may hold a
    password if `HF_ENDPOINT` names a mirror with one. They do not quote `HF_TOKEN`.
    """
    known = _USER.sub("***@", str(text))
    return _QUERY.sub(lambda found: found[1] + ("?***" if found[2] else ""), known)


def redact_hub_logs() -> None:
    """Redact what the Hub's library logs; call it once the library is imported."""
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_redact_record)


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), None
    return True


def printable(text: object, most: int = 300) -> str:
    """Return a text as one short line without control characters or passwords."""
    whole = redact(text)
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in whole[:most])
    more = f"… ({len(whole)} characters)" if len(whole) > most else ""
    return "".join(shown) + more
