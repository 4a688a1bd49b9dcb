"""Texts of other libraries and of other machines, without the passwords in them."""

import logging
import re

# Of an address: user and password, and the query, in which signatures are. Neither
# looks at a character twice, whoever wrote the text.
_USER = re.compile(r"(?<=://)[^\s/?#'\"]*@")
_QUERY = re.compile(r"(://[^\s?#'\"]*)(\?[^\s#'\"]+)?")


def redact(text: object) -> str:
    """Take users, passwords and queries out of the addresses in a text.

    The Hub's libraries quote the addresses that they asked, into which a mirror's
    `HF_ENDPOINT` may have brought a password. They do not quote `HF_TOKEN`.
    """
    known = _USER.sub("***@", str(text))
    return _QUERY.sub(lambda found: found[1] + ("?***" if found[2] else ""), known)


def redact_hub_logs() -> None:
    """Do so with what the Hub's library logs, once it is imported."""
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_redact_record)


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), None
    return True


def printable(text: object, most: int = 300) -> str:
    """Make a text one line without control characters or passwords, cut to a length."""
    whole = redact(text)
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in whole[:most])
    more = f"… ({len(whole)} characters)" if len(whole) > most else ""
    return "".join(shown) + more
