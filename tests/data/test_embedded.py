"""The data sets of the running Python, kept in files."""

import json
import os
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from slora_flwr.config import ConfigError
from slora_flwr.data import stdlib_docs, stdlib_summaries
from slora_flwr.data.embedded import read_embedded


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of one module."""
    path = tmp_path / "json" / "tool.py"
    path.parent.mkdir()
    path.write_text('"""One two three four five six seven eight."""\n')
    monkeypatch.setattr(stdlib_docs, "root", lambda: tmp_path)
    return path


@pytest.mark.parametrize(
    ("name", "module"),
    [("stdlib-docs", stdlib_docs), ("stdlib-summaries", stdlib_summaries)],
)
def test_what_is_kept_is_what_is_read(home: Path, name: str, module: Any) -> None:
    first, again = read_embedded(name), read_embedded(name)
    assert first == again
    assert again.columns == module.load()
    assert len(list((home / "cache").iterdir())) == 1


def test_it_is_kept_and_read_from_there(home: Path, library: Path) -> None:
    read_embedded("stdlib-docs")
    (kept,) = (home / "cache").iterdir()
    other = json.dumps({"text": ["other"], "chapter": ["data"]}).encode()
    kept.write_bytes(blake2b(other, digest_size=32).digest() + other)
    assert read_embedded("stdlib-docs").columns["text"] == ["other"]


def test_it_is_read_again_once_a_file_or_the_python_is_another(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def texts() -> list[str]:
        return read_embedded("stdlib-docs").columns["text"]

    assert texts() == ["One two three four five six seven eight."]
    changed = '"""Nine two three four five six seven eight."""\n'
    before = library.stat()
    library.write_text(changed)
    os.utime(library, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert texts() == ["Nine two three four five six seven eight."]
    library.write_text('"""Zero two three four five six seven eight."""\n')
    os.utime(library, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert texts() == ["Nine two three four five six seven eight."]
    monkeypatch.setattr(sys, "version", "another")
    assert texts() == ["Zero two three four five six seven eight."]


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLORA_HOME", str(tmp_path / "file"))
    with pytest.raises(
        ConfigError, match=r"\$SLORA_HOME is .*file.*; allowed: a folder"
    ):
        read_embedded("stdlib-docs")


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:-1], lambda d: d + d])
def test_a_damaged_file_is_made_again(
    home: Path, library: Path, damage: Callable[[bytes], bytes]
) -> None:
    whole = read_embedded("stdlib-docs")
    (kept,) = (home / "cache").iterdir()
    content = kept.read_bytes()
    kept.write_bytes(damage(content))
    assert read_embedded("stdlib-docs") == whole
    assert kept.read_bytes() == content
