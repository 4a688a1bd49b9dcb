"""Trackers write to folders of the tests, and nobody's settings reach them."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def trackio_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of Trackio's store, which it reads at its import."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trackio")
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ("WANDB_", "MLFLOW_", "TRACKIO_", "SLORA_METRICS")
    for name in [*os.environ]:
        if name.startswith(own) and name != "TRACKIO_DIR":
            monkeypatch.delenv(name)
    # Its staging area of artefacts.
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses and names on the network that this process asks for."""
    found: list[Any] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def recorded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            found.append(address)
        connect(self, address)

    def looked_up(host: Any, *given: Any, **named: Any) -> Any:
        found.append(host)
        return look_up(host, *given, **named)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    return found
