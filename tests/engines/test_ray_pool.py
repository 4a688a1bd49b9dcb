"""The pool of Ray workers: real Ray, real losses."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from flwr.clientapp.client_app import ClientAppException
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.simulation.ray_transport.ray_actor import BasicActorPool, ClientAppActor
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError

from slora_flwr.common.code_digest import code_digest
from slora_flwr.engines import ray_pool
from slora_flwr.engines.ray_pool import TRIES, LastingPool
from tests.support.processes import LONG, has_ended, wait_until

ROOT = Path(__file__).parents[2]
# What the workers of these tests import, in place of torch. Nothing else does.
NEEDED = ("colorsys",)


@pytest.fixture(scope="module", autouse=True)
def needed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_pool, "NEEDED", NEEDED)
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray head with room for one worker."""
    # Not pytest's folder: its path is too long for Ray's sockets.
    folder = tempfile.mkdtemp(prefix="ray-")
    arguments = {"num_cpus": 1, "include_dashboard": False, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    # The workers cannot import this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def run_app() -> Callable[..., tuple[int, int]]:
    """Return what stands for a ClientApp."""

    def app(message: dict[str, Any], context: Any) -> tuple[int, int]:
        log = Path(message.get("log", os.devnull))
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(log.read_text().split()) <= message.get("deaths", -1):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(message.get("seconds", 0))
        while "waits_for" in message and not Path(message["waits_for"]).exists():
            time.sleep(0.05)
        if "error" in message:
            raise ValueError(message["error"])
        return message.get("value", 0) ** 2, os.getpid()

    return app


@pytest.fixture(scope="module")
def backend(cluster: Cluster) -> Iterator[raybackend.RayBackend]:
    """Flower's backend on two machines with room for a worker each."""
    cluster.add_node(num_cpus=1)
    config: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    app_fn: Any = run_app
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raybackend, "BasicActorPool", BasicActorPool)
        ray_pool.install()
        backend = raybackend.RayBackend(config)
        backend.build(app_fn)
    assert backend.num_workers == 2
    pool = backend.pool
    assert isinstance(pool, LastingPool)
    yield backend
    assert not pool._future_to_actor
    assert not pool._jobs
    pool.terminate_all_actors()


@pytest.mark.parametrize("name", ray_pool.NEEDED)
def test_what_they_will_need_exists(name: str) -> None:
    assert find_spec(name) is not None


def run(actor: Any, *job: Any) -> Any:
    return actor.run.remote(*job)


def process(backend: raybackend.RayBackend, **message: Any) -> tuple[int, int]:
    context: Any = SimpleNamespace(node_config={"partition-id": 0})
    content: Any = message
    reply: Any = backend.process_message(content, context)[0]
    return reply


def workers(backend: raybackend.RayBackend, wanted: int = 2) -> set[int]:
    """Return the processes that take two messages at once, when they are so many."""
    found: set[int] = set()

    def look() -> bool:
        nonlocal found
        with ThreadPoolExecutor(2) as threads:
            jobs = [
                threads.submit(process, backend, value=i, seconds=0.3) for i in range(2)
            ]
            replies = [job.result() for job in jobs]
        assert [square for square, _ in replies] == [0, 1]
        found = {worker for _, worker in replies}
        return len(found) == wanted

    wait_until(look)
    return found


def pids(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()]


def test_a_worker_that_never_starts_is_given_up(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_pool, "TRIES", 2)

    @ray.remote
    class Broken:
        def __init__(self) -> None:
            raise OSError("no model here")

    pool = LastingPool(Broken, {"num_cpus": 1}, {})
    pool.add_actors_to_pool(1)
    with pytest.raises(TimeoutError, match="no Ray worker"):
        pool.submit(run, (run_app, {}, "0", None))
    assert caplog.text.count("A new or idle Ray worker has ended:") == 2
    assert "no model here" in caplog.text


def test_a_worker_with_other_code_gets_no_message(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_pool, "code_digest", lambda: "c0de")
    pool = LastingPool(ClientAppActor, {"num_cpus": 1}, {})
    pool.add_actors_to_pool(1)
    with pytest.raises(TimeoutError, match="no Ray worker"):
        pool.submit(run, (run_app, {}, "0", None))
    assert f"is {code_digest()}, the server's c0de" in caplog.text
    pool.terminate_all_actors()


def test_without_room_a_message_waits_so_long_and_fails(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "PATIENCE_SECONDS", 1.0)
    actor_type: Any = ClientAppActor
    holder = actor_type.options(num_cpus=1).remote()
    ray.get(holder.__ray_ready__.remote())
    pool = LastingPool(ClientAppActor, {"num_cpus": 1}, {})
    pool.add_actors_to_pool(1)
    with pytest.raises(TimeoutError, match="no Ray worker"):
        pool.submit(run, (run_app, {}, "0", None))
    pool.terminate_all_actors()
    ray.kill(holder)
    # The one that had no room does not take it now.
    other = actor_type.options(num_cpus=1).remote()
    ray.get(other.__ray_ready__.remote(), timeout=LONG)


def test_workers_import_what_they_will_need(backend: raybackend.RayBackend) -> None:
    workers(backend)  # which are ready then
    assert isinstance(backend.pool, LastingPool)
    idle: list[Any] = [*backend.pool.pool]
    assert len(idle) == 2
    for worker in idle:
        asked = worker.__ray_call__.remote(lambda _: set(NEEDED) <= sys.modules.keys())
        assert ray.get(asked)


def test_a_message_survives_its_worker(
    backend: raybackend.RayBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    assert process(backend, value=3, log=str(log), deaths=1)[0] == 9
    lost, survivor = pids(log)
    assert "A Ray worker is lost (try 1 of 3)" in caplog.text
    assert caplog.text.count("is lost") == 1
    found = workers(backend)
    assert survivor in found
    assert lost not in found


def test_a_message_that_ends_every_worker_fails_alone(
    backend: raybackend.RayBackend, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with pytest.raises(RayActorError):
        process(backend, log=str(log), deaths=99)
    assert len(set(pids(log))) == TRIES
    found = workers(backend)
    assert not found & set(pids(log))


def test_an_apps_error_is_the_apps_affair(
    backend: raybackend.RayBackend, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with pytest.raises(ClientAppException, match="no such label"):
        process(backend, log=str(log), error="no such label")
    assert len(pids(log)) == 1
    # And of a message that has lost a worker: the one that is alive becomes idle.
    with pytest.raises(ClientAppException, match="no such label"):
        process(backend, log=str(log), error="no such label", deaths=2)
    workers(backend)


def test_a_machine_is_lost_and_comes_back(
    backend: raybackend.RayBackend, cluster: Cluster, tmp_path: Path
) -> None:
    before = workers(backend)
    with ThreadPoolExecutor(2) as threads:
        logs = [tmp_path / str(i) for i in range(2)]
        jobs = [
            threads.submit(
                process, backend, value=i, log=str(log), waits_for=str(tmp_path / "go")
            )
            for i, log in enumerate(logs)
        ]
        wait_until(lambda: all(log.exists() for log in logs))
        (second,) = cluster.worker_nodes
        working = [psutil.Process(pid) for pid in before]
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: any(map(has_ended, working)))
        (tmp_path / "go").touch()
        assert [job.result()[0] for job in jobs] == [0, 1]
    # One of them ran twice, on the worker that is left.
    (left,) = {pids(log)[-1] for log in logs}
    assert left in before
    assert workers(backend, 1) == {left}
    cluster.add_node(num_cpus=1)
    assert left in workers(backend)


def test_idle_workers_of_a_lost_machine_cost_a_message_one_try(
    backend: raybackend.RayBackend, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    assert backend.pool is not None
    backend.pool.terminate_all_actors()  # to make room
    (node,) = cluster.worker_nodes
    pool = LastingPool(ClientAppActor, {"num_cpus": 0.3}, {})
    pool.add_actors_to_pool(6)
    while len(pool.pool) < 6:
        with pool._lock:
            pool._welcome()
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)
    for value in range(6):
        future = pool.submit(run, (run_app, {"value": value}, "0", None))
        message: Any = pool.fetch_result_and_return_actor_to_pool(future)[0]
        assert message[0] == value**2
    assert "try 2" not in caplog.text
    pool.terminate_all_actors()


@pytest.mark.parametrize(
    ("imported", "expected"),
    [
        ("flwr.simulation.app", "LastingPool"),
        ("flwr.supernode.cli.flwr_clientapp", "no Ray"),
    ],
)
def test_the_client_app_installs_it_in_simulation_only(
    imported: str, expected: str
) -> None:
    code = f"""
import sys, {imported}, client_app
if "ray" in sys.modules:
    from flwr.server.superlink.fleet.vce.backend import raybackend
    print(raybackend.BasicActorPool.__name__)
else:
    print("no Ray")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[-2] == expected


def test_a_pool_of_flowers_that_has_changed_is_left_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other:
        pass

    monkeypatch.setattr(raybackend, "BasicActorPool", Other)
    with pytest.raises(ImportError, match="BasicActorPool has changed: its use"):
        ray_pool.install()
    assert raybackend.BasicActorPool is Other
