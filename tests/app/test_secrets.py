"""No password or token is in what runs write and print, failed ones included."""

import json
import os
import subprocess
import sys
import threading
from base64 import b64encode
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slora_flwr.common.text import printable, redact
from tests.support.runs import INT8, SLORA, TOP, events, make_config

MARKER = b"marker-"
ROOT = Path(__file__).parents[2]
# Where the environment may hold a secret; each has a marker of its own.
VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "RAY_AUTH_TOKEN",
    "FLWR_AUTH_SECRET",
    "AWS_SECRET_ACCESS_KEY",
    "WANDB_API_KEY",
)


class Refusing(BaseHTTPRequestHandler):
    """A mirror of the Hub that lets nobody in."""

    asked: list[str | None]

    def do_HEAD(self) -> None:
        self.asked.append(self.headers["authorization"])
        self.send_error(401)

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclass
class Ran:
    """What came of the runs of `secretive`."""

    output: bytes
    home: Path
    folder: Path
    asked: list[str | None]


@pytest.fixture(scope="module")
def ran(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Ran:
    folder = tmp_path_factory.mktemp("secrets")
    home = folder / "home"
    config = make_config(corpus, tiny_models["bert"], home / "runs" / "whole")
    config |= SLORA | INT8 | TOP | {"rounds": 2, "run.target": 0.01}
    Refusing.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirror = f"http://somebody:marker-mirror@127.0.0.1:{server.server_port}"
        done = subprocess.run(
            [
                sys.executable,
                ROOT / "tests" / "support" / "secretive.py",
                json.dumps(config),
                home / "others",
            ],
            env={
                **os.environ,
                **{name: f"marker-{name}" for name in VARIABLES},
                "HTTPS_PROXY": "http://somebody:marker-proxy@127.0.0.1:9",
                "HF_ENDPOINT": mirror,
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(folder / "hub"),
                "SLORA_HOME": str(home),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        server.shutdown()
    assert done.returncode == 0, done.stdout.decode()
    return Ran(done.stdout, home, folder, Refusing.asked)


def test_the_runs_went_as_they_were_meant_to(ran: Ran) -> None:
    """Or the next test would find nothing for want of anything to find."""
    output = ran.output.decode()
    # The mirror was shown both.
    password = b64encode(b"somebody:marker-mirror").decode()
    assert {f"Basic {password}", "Bearer marker-HF_TOKEN"} <= {*ran.asked}
    assert (ran.home / "runs" / "whole" / "adapter" / "classes.json").is_file()
    for name in ("model", "data", "studied", "of-a-node", "by-token"):
        assert f"name is 'someone/{name}'; allowed: " in output, name
    assert output.count("http://***@127.0.0.1") >= 4
    for key in ("model.name", "data.name", "data.test", "run.resume"):
        assert f"{key} is an address with a password" in output
    assert "asked http://***@example.org/model" in output
    left_out, *_ = events(ran.home / "others" / "5", "left_out")
    assert "model.name is 'someone/of-a-node'" in left_out["reason"]
    [stopped] = events(ran.home / "others" / "5", "stopped")
    assert stopped["reason"].startswith("FleetError: no node can train")


def test_no_secret_is_written_or_printed(ran: Ran) -> None:
    files = [path for path in ran.home.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert MARKER not in path.read_bytes(), path
        assert MARKER.decode() not in str(path)
    at = ran.output.find(MARKER)
    assert at < 0, ran.output[max(0, at - 300) : at + 100].decode()


def test_addresses_are_redacted_by_hand() -> None:
    for text, expected in {
        "https://me:pass@host/x": "https://***@host/x",
        "https://token@host": "https://***@host",
        "at 'http://me:p@ss@host:80/a' or": "at 'http://***@host:80/a' or",
        "https://host/a?sig=1&x=2#top": "https://host/a?***#top",
        "a://b/https://me:pass@host/?q": "a://b/https://***@host/?***",
        "me@host and https://host/x@y": "me@host and https://host/x@y",
    }.items():
        assert redact(text) == printable(text) == expected


@pytest.mark.parametrize("part", ["://", "://a", "://a?", "://a@", "?", "@", "a"])
def test_redaction_takes_no_longer_for_what_is_hostile(part: str) -> None:
    redact("://" + part * 10**6)
