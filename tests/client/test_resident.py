"""The resident worker of a node, as real processes, and a deployment that uses it."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from slora_flwr.client import handlers as node
from slora_flwr.client import resident
from slora_flwr.client.errors import MismatchError
from slora_flwr.client.process import get_process
from slora_flwr.client.protocol import read_message
from slora_flwr.wire.messages import Instruction
from slora_flwr.wire.packing import pack
from tests.support.processes import LONG, free_port, is_open, residents, wait_until

ROOT = Path(__file__).parents[2]
NODE = 77


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an own temporary folder, short enough for the path of a Unix socket."""
    path = Path(tempfile.mkdtemp(prefix="slora-"))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    monkeypatch.setenv("TMPDIR", str(path))
    yield path
    for thread in threading.enumerate():
        if thread.name == "resident":
            for socket_path in path.glob("*/*.sock"):
                with suppress(ConnectionError, EOFError):  # it is ending
                    end(socket_path)
            thread.join()
    for process in residents(path):
        process.kill()
    shutil.rmtree(path)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen]:
    """Return a process that stands for the SuperExec."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(os, "getppid", lambda: process.pid)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def task(tmp_path: Path, tiny_models: dict[str, Path]) -> dict[str, Any]:
    """Return the config of a task that is soon loaded."""
    rows = [f"w{i} w{i + 1},{'odd' if i % 2 else 'even'}" for i in range(40)]
    data = tmp_path / "rows.csv"
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    return {
        "method": "lora",
        "model.name": str(tiny_models["bert"]),
        "data.name": str(data),
        "data.max-length": 16,
    }


def make_context(run_config: dict[str, Any] | None = None, run_id: int = 5) -> Context:
    return Context(
        run_id=run_id,
        node_id=NODE,
        node_config={
            "partition-id": 0,
            "num-partitions": 2,
            "allowed-folders": "/",
        },
        state=RecordDict(),
        run_config={"clients.count": 0, **(run_config or {})},
    )


def make_message(kind: str, content: RecordDict | None = None) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 0, 0
    message = Message(content or RecordDict(), NODE, kind)
    message.metadata.__dict__["_message_id"] = "the message"
    return message


def facts(message: Message) -> bytes:
    """Return all of a message but its times."""
    proto = message_to_proto(message)
    proto.metadata.created_at = proto.metadata.ttl = 0
    for record in proto.content.items:
        for item in record.metric_record.items:
            if item.key == "seconds":
                item.ClearField("value")
    return proto.SerializeToString(deterministic=True)


def serve_here(
    monkeypatch: pytest.MonkeyPatch,
    *behaviours: Callable[[socket.socket, Path], None],
) -> None:
    """Let threads stand for the resident workers that would be started."""
    left = iter(behaviours)

    class Thread(threading.Thread):
        def wait(self) -> int:
            self.join()
            return 3

    def start(path: Path, *arguments: Any) -> Thread:
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        thread = Thread(None, next(left), "resident", (listener, path))
        thread.start()
        return thread

    monkeypatch.setattr(resident, "_start", start)


def end(path: Path) -> None:
    """Ask a resident worker to end, as another run's ClientApp does."""
    with socket.socket(socket.AF_UNIX) as unix:
        unix.connect(str(path))
        with Connection(unix.detach()) as channel:
            channel.recv_bytes()  # its identity
            channel.send_bytes(b"end")
            assert channel.recv_bytes() == b"asked to"


def leave_amid_a_message(listener: socket.socket, path: Path) -> None:
    with listener, Connection(listener.accept()[0].detach()) as channel:
        channel.send_bytes(resident._identity(5, os.getppid()).encode())
        assert channel.recv_bytes(6) == b"handle"
        read_message(channel)


def serve(listener: socket.socket, path: Path) -> None:
    resident.serve(listener, path, 5, os.getppid(), LONG)


def resident_left(folder: Path) -> psutil.Process:
    """Return the one that is there once all that it replaced have ended."""
    wait_until(lambda: len(residents(folder)) == 1)
    (process,) = residents(folder)
    return process


def test_it_answers_as_the_handlers_do_and_stays(
    folder: Path, task: dict[str, Any]
) -> None:
    context = make_context(task)
    trainer = get_process(context).trainer
    adapter = trainer.model.attach(trainer.schedule[0])
    instruction = Instruction(1, 0, [0], adapter.fingerprint(), pack(adapter.state()))
    query = make_message("query")

    def train() -> Message:  # a node frees what it has read
        return make_message("train", instruction.content())

    assert facts(resident.handle(query, context)) == facts(node.query(query, context))
    (first,) = residents(folder)
    here = node.train(train(), context)
    assert facts(resident.handle(train(), context)) == facts(here)
    assert residents(folder) == [first]

    # What a handler raises arrives with Flower's view of it: the type and the text.
    instruction.fingerprint = "0" * 32
    with pytest.raises(MismatchError) as known:
        node.train(train(), context)
    with pytest.raises(Exception, match="has fingerprint") as there:
        resident.handle(train(), context)
    assert str(there.type) == str(known.type)
    assert str(there.value) == str(known.value)
    assert "prepare" in there.value.__notes__[0]
    # A process in which an exception was raised is not kept.
    wait_until(lambda: not residents(folder))


def test_only_its_user_can_open_it(folder: Path) -> None:
    resident._reach(make_context(), LONG).close()
    (owned,) = folder.iterdir()
    assert stat.S_IMODE(owned.stat().st_mode) == 0o700
    (path,) = owned.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    owned.chmod(0o750)
    with pytest.raises(resident.ResidentError, match="only this user"):
        resident._reach(make_context(), LONG)


def test_a_folder_that_is_a_link_is_refused(folder: Path) -> None:
    (folder / "elsewhere").mkdir(mode=0o700)
    (folder / f"slora-{os.getuid()}").symlink_to(folder / "elsewhere")
    with pytest.raises(resident.ResidentError, match="only this user"):
        resident._reach(make_context(), LONG)


def test_a_race_starts_one(folder: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(resident._reach, make_context(), LONG) for _ in range(6)]
        # They are served one after the other.
        for job in jobs:
            threading.Thread(target=lambda j=job: j.result().close()).start()
    assert len(residents(folder)) == 1


def test_a_killed_one_is_replaced(folder: Path) -> None:
    resident._reach(make_context(), LONG).close()
    (first,) = residents(folder)
    first.kill()
    resident._reach(make_context(), LONG).close()
    (second,) = residents(folder)
    assert second != first


def test_it_ends_when_idle(folder: Path) -> None:
    resident._reach(make_context(), 0.3).close()
    (owned,) = folder.iterdir()
    wait_until(lambda: not residents(folder))
    assert not list(owned.iterdir())


def test_it_ends_with_its_launcher(folder: Path, launcher: subprocess.Popen) -> None:
    # The open connection keeps it busy, as a message would.
    with resident._reach(make_context(), LONG):
        assert residents(folder)
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not residents(folder))


def test_another_run_or_launcher_takes_its_place(
    folder: Path, launcher: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for run_id, pid in ((5, launcher.pid), (6, launcher.pid), (6, os.getpid())):
        monkeypatch.setattr(os, "getppid", lambda pid=pid: pid)
        resident._reach(make_context(run_id=run_id), LONG).close()
        seen.append(resident_left(folder))
    assert len({*seen}) == 3


def test_another_bundle_is_served_by_its_own_code(folder: Path) -> None:
    reach = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from flwr.app import Context, RecordDict;"
        "from slora_flwr.client import resident;"
        f"context = Context(5, {NODE}, {{}}, RecordDict(), {{}});"
        f"resident._reach(context, {LONG}).close()"
    )

    def reached(bundle: Path) -> psutil.Process:
        subprocess.run([sys.executable, "-c", reach, str(bundle)], check=True)
        process = resident_left(folder)
        assert process.environ()["PYTHONPATH"].startswith(f"{bundle}:")
        return process

    bundle = folder / "bundle"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "slora_flwr", bundle / "slora_flwr", ignore=ignored)
    first = reached(bundle)
    assert reached(bundle) == first
    with (bundle / "slora_flwr" / "__init__.py").open("a") as file:
        file.write("# another version\n")
    assert reached(bundle) != first


def test_one_that_ends_amid_a_message_is_replaced_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(message: Message, context: Context) -> Message:
        context.state["seen"] = message.content["config"]
        return Message(message.content, reply_to=message)

    monkeypatch.setattr(resident, "_handle_here", answer)
    context = make_context()
    content = RecordDict({"config": ConfigRecord({"a": 1})})
    message = make_message("train", content)
    serve_here(monkeypatch, leave_amid_a_message, serve)
    assert resident.handle(message, context).content == content
    assert dict(context.state.config_records["seen"]) == {"a": 1}

    (path,) = (folder / f"slora-{os.getuid()}").iterdir()
    end(path)
    serve_here(monkeypatch, leave_amid_a_message, leave_amid_a_message)
    with pytest.raises(resident.ResidentError, match="two resident workers ended"):
        resident.handle(message, context)


def test_one_that_cannot_start_leaves_the_work_to_this_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resident, "_handle_here", lambda message, context: message)
    serve_here(monkeypatch, lambda listener, path: listener.close())
    message = make_message("query")
    with caplog.at_level("WARNING", "flwr"):
        assert resident.handle(message, make_context()) is message
    assert "ended with status 3 as it started" in caplog.text


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x00",
        (100).to_bytes(4, "big") + b"too short",
        b"\xff\xff\xff\xff" + (1 << 40).to_bytes(8, "big"),
        (6).to_bytes(4, "big") + b"handle",
        (6).to_bytes(4, "big") + b"handle" + (9).to_bytes(4, "big") + b"no proto!",
    ],
    ids=["no length", "cut", "too long", "no message", "no protobuf"],
)
def test_a_client_that_breaks_off_does_no_harm(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sent: bytes,
) -> None:
    monkeypatch.setattr(resident, "_handle_here", lambda message, context: message)
    serve_here(monkeypatch, serve)
    context, message = make_context(), make_message("query")
    with caplog.at_level("WARNING", "flwr"):
        with resident._reach(context, 60) as channel:
            os.write(channel.fileno(), sent)
        assert facts(resident.handle(message, context)) == facts(message)
    assert "a ClientApp left before it had its reply" in caplog.text


def test_zero_seconds_and_ray_need_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_handle_here", lambda message, context: message)
    serve_here(monkeypatch)
    message, context = make_message("query"), make_context()
    context.node_config["resident-seconds"] = 0
    assert resident.handle(message, context) is message
    context.node_config["resident-seconds"] = "long"
    with pytest.raises(ValueError, match="allowed: 0 to 86400"):
        resident.handle(message, context)
    del context.node_config["resident-seconds"]
    ray = type("Ray", (), {"is_initialized": staticmethod(lambda: True)})
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert resident.handle(message, context) is message


@pytest.mark.sockets
def test_a_deployment_completes_and_leaves_nothing(
    folder: Path, task: dict[str, Any]
) -> None:
    tools = Path(sys.executable).parent
    environment = {
        **os.environ,
        # Where Flower looks for what it starts itself.
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "flower"),
        "SLORA_HOME": str(folder / "home"),
    }
    (folder / "flower").mkdir()
    link = free_port()
    (folder / "flower" / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )

    def command(*arguments: str | Path) -> dict[str, Any]:
        # Not in the checkout, whose code would go before the bundle's.
        options: dict[str, Any] = {"cwd": folder, "env": environment}
        return {"args": arguments, **options}

    log = (folder / "nodes.log").open("w")
    superlink = subprocess.Popen(
        **command(tools / "flower-superlink", "--insecure", "--port", str(link)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started = [superlink]
    try:
        wait_until(lambda: is_open(link))
        for index in range(2):
            address = ("--insecure", "--superlink", f"127.0.0.1:{link}")
            port = ("--port", str(free_port()), "--poll-seconds", "0.2")
            told = f'partition-id={index} num-partitions=2 allowed-folders="/"'
            given = ("--node-config", told)
            supernode = (sys.executable, "-m", "slora_flwr.client.supernode")
            started.append(
                subprocess.Popen(
                    **command(*supernode, *address, *port, *given),
                    stdout=log,
                    stderr=log,
                )
            )
        values = {
            **task,
            "rounds": 1,
            "clients.count": 0,
            "clients.per-round": 2,
            "clients.min-nodes": 2,
            "run.dir": str(folder / "run"),
        }
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        done = subprocess.run(
            **command(
                tools / "flwr", "run", ROOT, "here", "--stream", "--run-config", text
            ),
            capture_output=True,
            text=True,
            check=False,
        )
        logged = (folder / "nodes.log").read_text()
        assert (folder / "run" / "summary.json").exists(), f"{done}{logged}"
        # Each was started once for its three messages (to describe itself, to train, to
        # remove what it keeps), and says so in the node's log.
        assert logged.count("Start `flwr-clientapp` process") == 6
        assert logged.count("resident worker") == 2
        assert len(residents(folder)) == 2
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        log.close()

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == environment["FLWR_HOME"]:
                    found.append(process)
            except psutil.Error:  # gone, or another user's: not ours
                continue
        return found

    try:
        wait_until(lambda: not left())
    finally:
        for process in left():
            process.kill()
