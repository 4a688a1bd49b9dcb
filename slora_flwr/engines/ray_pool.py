"""The pool of Ray workers in Flower's simulation, which replaces lost workers.

If a worker dies, Flower answers its message with an error and returns the dead worker
to the idle ones, where it fails every later message. This pool sends the message to
another worker and starts a new one. The reply is the same, since training depends only
on the message.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from importlib import import_module
from logging import WARNING
from textwrap import shorten
from typing import Any

import ray
from flwr.common.logger import log
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError

from slora_flwr.common.code_digest import code_digest
from slora_flwr.engines.start_up import RAY_TIP

# How often one message may lose its worker, and one worker die before it is ready.
# Without a limit, a client that kills every process it trains in would never end.
TRIES = 3
# How long a message waits while there is no worker at all, idle or busy. The run cannot
# end before that.
PATIENCE_SECONDS = 300.0
POLL_SECONDS = 0.1

# What a message needs; to import it takes seconds.
NEEDED = ("slora_flwr.client.handlers", "transformers.modeling_utils")

# An actor is also lost if its machine runs out of memory, a result with its machine.
LOST = (RayActorError, ObjectLostError, OutOfMemoryError)

_PARTS = {
    "pool",
    "num_actors",
    "create_actor_fn",
    "_future_to_actor",
    "add_actors_to_pool",
    "terminate_all_actors",
    "submit",
    "add_actor_back_to_pool",
    "fetch_result_and_return_actor_to_pool",
}


class LastingPool(BasicActorPool):
    """Flower's pool of Ray actors, which replaces lost actors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock = threading.Lock()  # guards `pool`, `num_actors` and `_starting`
        # Actors not known to be alive, with the number lost before each, by the
        # reference to their code's digest. The digest may take long to arrive: until a
        # machine with room for the actor is back.
        self._starting: dict[Any, tuple[Any, int]] = {}
        self._unfit: list[Any] = []
        self._jobs: dict[Any, tuple[Any, Any]] = {}

    def add_actors_to_pool(self, num_actors: int) -> None:
        """Start actors, which become idle when they are ready.

        They import what they will need, while the server loads its model.
        """
        with self._lock:
            self.num_actors += num_actors
            for _ in range(num_actors):
                self._await(actor := self.create_actor_fn())
                actor.__ray_call__.remote(_import, NEEDED)

    def terminate_all_actors(self) -> None:
        """Kill the idle actors, the unfit ones, and those that wait for a machine."""
        super().terminate_all_actors()
        for actor in [*self._unfit, *(actor for actor, _ in self._starting.values())]:
            ray.kill(actor)

    def submit(self, actor_fn: Any, job: Any) -> Any:
        """Submit a job to an idle actor, or to the first that becomes idle."""
        actor = self._take()
        future = actor_fn(actor, *job)
        self._future_to_actor[future] = actor
        self._jobs[future] = actor_fn, job
        return future

    def add_actor_back_to_pool(self, future: Any) -> None:
        """Return a job's actor to the idle ones, unless the job lost its last."""
        actor = self._future_to_actor.pop(future, None)
        if actor is not None:
            with self._lock:
                self.pool.append(actor)

    def fetch_result_and_return_actor_to_pool(self, future: Any) -> Any:
        """Wait for a job's result, and run the job again if its actor is lost.

        Raises
        ------
        RayError
            If the job lost `TRIES` actors.
        TimeoutError
            If no actor became available to run it again.
        Exception
            Any exception of the ClientApp.
        """
        actor_fn, job = self._jobs.pop(future)
        running = future
        for tries in range(1, TRIES + 1):
            try:
                _, message, context = ray.get(running)
                break
            except LOST as error:
                log(
                    WARNING,
                    "A Ray worker is lost (try %i of %i): %s",
                    tries,
                    TRIES,
                    shorten(str(error), 300),
                )
                self._replace(self._future_to_actor.pop(future))
                if tries == TRIES:
                    raise
            # Keyed by the first reference, the one that Flower knows.
            self._future_to_actor[future] = actor = self._take()
            running = actor_fn(actor, *job)
        self.add_actor_back_to_pool(future)
        return message, context

    def _take(self) -> Any:
        """Wait for an idle actor and return it."""
        given_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            with self._lock:
                self._welcome()
                if self.pool:
                    return self.pool.pop()
            if self._future_to_actor:  # a busy actor becomes idle sooner or later
                given_up = time.monotonic() + PATIENCE_SECONDS
            if not self.num_actors or time.monotonic() > given_up:
                raise TimeoutError("there is no Ray worker for this message")
            time.sleep(POLL_SECONDS)

    def _welcome(self) -> None:
        """Add the actors that have become ready to the idle ones."""
        waiting = list(self._starting)
        ready = (
            ray.wait(waiting, num_returns=len(waiting), timeout=0)[0] if waiting else ()
        )
        for reference in ready:
            actor, lost = self._starting.pop(reference)
            try:
                code = ray.get(reference)
            except LOST as error:
                log(WARNING, "A new or idle Ray worker has ended: %s", error)
                ray.kill(actor)
                if lost + 1 < TRIES:
                    self._await(self.create_actor_fn(), lost + 1)
                else:
                    self.num_actors -= 1
                continue
            except Exception as error:  # its machine may lack the right packages
                code = str(error)
            if code == code_digest():
                self.pool.append(actor)
                continue
            log(
                WARNING,
                "A Ray worker is unusable: its slora-flwr is %s, the server's %s",
                code,
                code_digest(),
            )
            # Kept alive, since Ray would start the next one in its place.
            self._unfit.append(actor)
            self.num_actors -= 1

    def _replace(self, actor: Any) -> None:
        """Start a new actor in place of a lost one."""
        ray.kill(actor)  # an unreachable actor may still hold its resources
        with self._lock:
            self._await(self.create_actor_fn(), 1)
            # The idle actors may have been on the same machine. They become idle again
            # once they have answered, so that no job tries several dead ones.
            for idle in self.pool:
                self._await(idle)
            self.pool.clear()

    def _await(self, actor: Any, lost: int = 0) -> None:
        self._starting[actor.__ray_call__.remote(_code)] = actor, lost


def _code(actor: Any) -> str:
    return code_digest()


def _import(actor: Any, names: Iterable[str]) -> None:
    for name in names:
        import_module(name)


def install() -> None:
    """Make Flower's simulation in this process use `LastingPool`.

    Raises
    ------
    ImportError
        If Flower's own pool has changed, so that `LastingPool` does not fit it.
    """
    known = {*vars(BasicActorPool), *BasicActorPool.__init__.__code__.co_names}
    missing = sorted(_PARTS - known)
    if vars(raybackend).get("BasicActorPool") is not BasicActorPool:
        missing.append("its use")
    if missing:
        raise ImportError(f"Flower's BasicActorPool has changed: {', '.join(missing)}")
    if not sys.warnoptions:  # of PYTHONWARNINGS
        warnings.filterwarnings("ignore", RAY_TIP, FutureWarning)
    vars(raybackend)["BasicActorPool"] = LastingPool
    # Workers that Ray starts before it is asked for any. Flower's actors, which have
    # environment variables of their own, use none of them.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
