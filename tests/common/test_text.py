"""Text of others, made fit to print."""

from slora_flwr.common.text import printable


def test_text_to_print() -> None:
    assert printable("plain, ünïcode") == "plain, ünïcode"
    assert printable("a\nb\x1b[1m\t\u202e\ud800") == r"a\nb\x1b[1m\t\u202e\ud800"
    assert printable("x" * 301) == "x" * 300 + "… (301 characters)"
    assert printable(None) == "None"
