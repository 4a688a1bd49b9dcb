"""The embedded instructions: signatures, first sentences, groups, splits."""

from pathlib import Path

import pytest

from slora_flwr.config import ConfigError, DataConfig
from slora_flwr.data.data_sets import load_texts
from slora_flwr.data.stdlib_docs import CHAPTERS
from slora_flwr.data.stdlib_summaries import first_sentence, signatures
from slora_flwr.data.texts import Texts
from tools.pretrain_llama import without

MODULE = '''
"""A module."""

class Box(dict, metaclass=type):
    """A box.  It opens."""

    async def open(self, /, key: str = "a", *rest, force=False):
        """Open the box with a
        key, e.g. a small one. And so on.

        More.
        """

    def close(self):
        return None

    if True:
        def shut(self, *, hard):
            """Shut it
            """
'''


def load(by: str = "") -> tuple[Texts, Texts]:
    return load_texts(DataConfig(name="stdlib-summaries"), by, dialogues=True)


def test_signatures_stand_beside_the_first_sentences(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    found = [(name, first_sentence(text)) for name, text in signatures(path)]
    assert found == [
        ("class Box(dict)", "A box."),
        (
            "def Box.open(self, /, key: str='a', *rest, force=False)",
            "Open the box with a key, e.g. a small one.",
        ),
        ("def Box.shut(self, *, hard)", "Shut it"),
    ]


def test_the_instructions_are_dealt_by_chapter_or_by_module() -> None:
    train, test = load()
    assert (train, test) == load()
    assert 4000 < len(train.texts) + len(test.texts) < 12_000
    assert 0.17 < len(test.texts) / (len(train.texts) + len(test.texts)) < 0.23
    for part in (train, test):
        assert {*part.labels} <= {*CHAPTERS}
    assert len({*train.labels}) > 8
    said = [{d[-1]["content"] for d in part.dialogues} for part in (train, test)]
    assert not said[0] & said[1]
    prompts = {d[0]["content"]: d[-1]["content"] for d in train.dialogues}
    prompts |= {d[0]["content"]: d[-1]["content"] for d in test.dialogues}
    signature = "shutil: def copyfileobj(fsrc, fdst, length=0)"
    copied = "copy data from file-like object fsrc to file-like object fdst"
    assert prompts[signature] == copied

    modules = load("module")[0].labels
    assert {"shutil", "email"} < {*modules}
    assert len({*modules}) > 100
    with pytest.raises(ConfigError, match=r"clients\.by names 'author'; .* chapter"):
        load("author")


def test_both_embedded_data_sets_serve_both_tasks() -> None:
    labelled, _ = load_texts(DataConfig(name="stdlib-summaries"))
    assert {*labelled.labels} <= {*CHAPTERS}
    assert not labelled.dialogues
    learned, _ = load_texts(DataConfig(name="stdlib-docs"), dialogues=True)
    assert all(len(dialogue) == 1 for dialogue in learned.dialogues)
    assert {*learned.labels} <= {*CHAPTERS}


def test_pretraining_leaves_out_the_sentences_that_are_asked_for() -> None:
    passage = "Return the\n    sum. Or raise.\n\nMore of it."
    assert first_sentence(passage) == "Return the sum."
    assert without(passage, {"Return the sum."}) == "Or raise.\n\nMore of it."
    assert without(passage, {"Or raise."}) == passage
    assert without("Return the sum.", {"Return the sum."}) == ""
