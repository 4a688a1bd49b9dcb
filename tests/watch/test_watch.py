"""`slora watch`: the stream of a run's events, and who may ask for it."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from slora_flwr.runs.events import EVENTS, Resumed, Stopped, to_line
from slora_flwr.runs.tail import Place, lines_after
from slora_flwr.watch.server import follow, make_app
from slora_flwr.watch.told import tell
from tests.support.recorded import write_run

LOOK = 0.01


async def until(stream: AsyncIterator[str], text: str) -> str:
    """Return what comes up to a text."""
    come = ""
    async for part in stream:
        come += part
        if text in come:
            return come
    raise AssertionError(come)


def ids(come: str) -> list[str]:
    return [line[4:] for line in come.splitlines() if line.startswith("id: ")]


def words(come: str) -> list[str]:
    data = [line[6:] for line in come.splitlines() if line.startswith("data: {")]
    return [told["words"] for told in map(json.loads, data) if "words" in told]


def test_half_a_line_is_none_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntw")
    [(place, line)] = lines_after(path, Place()).lines
    assert (place.end, line) == (4, b"one")
    assert lines_after(path, place).lines == []
    path.write_bytes(b"one\ntwo\n")
    assert [line for _, line in lines_after(path, place).lines] == [b"two"]
    assert Place.read(str(place)) == place


@pytest.mark.parametrize("after", ["one\n", "one\nnew and longer than before\n", ""])
def test_a_file_that_was_cut_back_is_read_anew(tmp_path: Path, after: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\nthree\n")
    place, _ = lines_after(path, Place()).lines[-1]
    path.write_text(after)
    found = lines_after(path, place)
    assert found.anew
    assert [line.decode() for _, line in found.lines] == after.splitlines()


@pytest.mark.parametrize("given", ["", "-1-2", "x", "9" * 400 + "-1", "4-1", "4-1\n"])
def test_a_place_that_is_none_is_the_start(tmp_path: Path, given: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\n")
    assert len(lines_after(path, Place.read(given)).lines) == 1


def test_a_reconnecting_reader_gets_each_line_once(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", ended=False)

    async def read() -> None:
        come = await until(follow(lambda: path, Place(), LOOK), "event: state")
        assert len(ids(come)) == len(words(come)) == 4
        # It goes away after the second one, and more is written meanwhile.
        with (path / EVENTS).open("a") as file:
            file.write(to_line(Stopped(reason="again")))
        second = Place.read(ids(come)[1])
        more = await until(follow(lambda: path, second, LOOK), "event: state")
        assert "event: anew" not in more
        assert words(more)[:2] == words(come)[2:]
        assert words(more)[2:] == ["stopped: again"]
        # What is written while it reads comes too, once it is whole.
        last = Place.read(ids(more)[-1])
        stream = follow(lambda: path, last, LOOK)
        await until(stream, "event: state")
        line = to_line(Stopped(reason="late"))
        with (path / EVENTS).open("a") as file:
            file.write(line[:20])
            file.flush()
            await asyncio.sleep(5 * LOOK)
            file.write(line[20:])
        assert words(await until(stream, "late")) == ["stopped: late"]

    asyncio.run(read())


def test_a_resumed_run_begins_anew(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", ended=False)
    first = len((path / EVENTS).read_bytes().splitlines(keepends=True)[0])

    async def read() -> None:
        stream = follow(lambda: path, Place(), LOOK)
        await until(stream, "event: state")
        os.truncate(path / EVENTS, first)
        with (path / EVENTS).open("a") as file:
            file.write(to_line(Resumed(round=1, run="7" * 2000)))
        come = await until(stream, "resumed after")
        assert come.startswith("event: anew\n")
        assert [text.split(" (")[0] for text in words(come)] == [
            "round 1",
            "resumed after round 1",
        ]

    asyncio.run(read())


def test_states_are_told(tmp_path: Path) -> None:
    found: list[Path] = []

    async def read() -> None:
        stream = follow(lambda: found[-1] if found else None, Place(), LOOK)
        assert '"waiting"' in await until(stream, "state")
        found.append(write_run(tmp_path / "a"))
        come = await until(stream, "event: state")
        assert '"finished"' in come
        assert "event: anew" not in come
        # A newer run takes its place.
        found.append(write_run(tmp_path / "b", ended=False))
        come = await until(stream, '"failed"')
        assert come.startswith("event: anew\n")
        assert len(words(come)) == 4
        shutil.rmtree(found[-1])
        assert '"gone"' in await until(stream, "event: state")

    asyncio.run(read())


def test_silence_is_broken_by_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slora_flwr.watch.server.SILENCE", 3 * LOOK)
    path = write_run(tmp_path / "run")

    async def read() -> None:
        stream = follow(lambda: path, Place(), LOOK)
        await until(stream, "event: state")
        assert await anext(stream) == ": here\n\n"

    asyncio.run(read())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("127.0.0.1.evil.example:80", 400),
        ("", 400),
    ],
)
def test_only_this_machine_is_answered(tmp_path: Path, host: str, status: int) -> None:
    path = write_run(tmp_path / "run")
    with TestClient(make_app(lambda: path)) as client:
        for place in ("/", "/watch.js", "/report"):
            answer = client.get(place, headers={"Host": host})
            assert answer.status_code == status
            if status == 200:
                policy = answer.headers["Content-Security-Policy"]
                assert policy.startswith("default-src 'none'; script-src 'self';")


def test_nothing_else_can_be_asked_for(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    base = "http://localhost"
    with TestClient(make_app(lambda: path), base_url=base) as client:
        for place in ("/events.jsonl", "/../run/config.toml", "/..%2fconfig.toml"):
            assert client.get(place).status_code == 404
        for method in ("POST", "PUT", "DELETE"):
            assert client.request(method, "/report").status_code == 405


def test_text_of_nodes_is_no_markup(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\r\n\r\nid: 7"
    path = write_run(tmp_path / "run", failures=[hostile])
    with TestClient(make_app(lambda: path), base_url="http://localhost") as client:
        html = client.get("/report").text
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    told = tell((path / EVENTS).read_bytes().splitlines()[-1])
    assert "\r" not in told["words"]
    for damaged in (b"\0\0", b"{", b"[]", b'{"event": "round"}'):
        assert tell(damaged)["words"] == "a line cannot be read"
    assert tell(b'{"event": "later"}')["words"] == "an event of another version"
