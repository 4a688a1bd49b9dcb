"""Text of others, made fit to print."""

from slora_flwr.common.text import counted, printable


def test_text_to_print() -> None:
    assert printable("plain, ünïcode") == "plain, ünïcode"
    assert printable("a\nb\x1b[1m\t\u202e\ud800") == r"a\nb\x1b[1m\t\u202e\ud800"
    assert printable("x" * 301) == "x" * 300 + "… (301 characters)"
    assert printable(None) == "None"


def test_counted_nouns() -> None:
    assert [counted(n, "node") for n in (0, 1, 2)] == ["0 nodes", "1 node", "2 nodes"]
    assert counted(1, "node is", "nodes are") == "1 node is"
    assert counted(2, "node is", "nodes are") == "2 nodes are"
