"""What the SuperNode is started with."""

import sys

import pytest

from slora_flwr.client import supernode


@pytest.mark.parametrize("trusted", ["", "/run/trusted.yml"])
def test_a_file_of_trusted_entities_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, trusted: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["supernode", "--poll-seconds", "1", "--insecure"])
    monkeypatch.setenv("SLORA_TRUSTED", trusted)
    monkeypatch.setenv("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "1")
    monkeypatch.setattr(supernode.main_loop, "time", supernode.time)
    monkeypatch.setattr(supernode, "flower_supernode", lambda: None)
    supernode.main()
    given = ["--trusted-entities", trusted] if trusted else []
    assert sys.argv[1:] == ["--insecure", *given]
