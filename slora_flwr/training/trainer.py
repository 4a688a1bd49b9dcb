"""A run's data and model in one process, for training clients and evaluating."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import torch

from slora_flwr.common.tensors import State
from slora_flwr.config import RunConfig, flatten
from slora_flwr.config.schedule import Phase, make_schedule
from slora_flwr.data.examples import Examples
from slora_flwr.tasks.base import Evaluation, Probe, Sample
from slora_flwr.tasks.choice import find_task
from slora_flwr.training.attached_model import AttachedModel
from slora_flwr.training.attack import is_flipped, spoil_update
from slora_flwr.training.loop import DeadlineError, evaluate, train
from slora_flwr.training.precision import precision_of
from slora_flwr.training.private import train_privately
from slora_flwr.training.process_data import ProcessData


class ClientError(RuntimeError):
    """One client's training or evaluation failed; other clients are unaffected."""


@dataclass
class ClientUpdate:
    """The result of a client's training.

    Attributes
    ----------
    update : State
        The trained state minus the state that was sent.
    loss : float
        Mean loss.
    weight : int
        What the client weighs in means of updates: its examples or its learned tokens.
    """

    update: State
    loss: float
    weight: int


class Trainer:
    """The data and the model of a run, kept between clients, rounds and phases.

    Parameters
    ----------
    config, classes
        As in `ProcessData`.
    model : AttachedModel or None
        The model of the run's server, if this process is the server's too.
    """

    def __init__(
        self,
        config: RunConfig,
        classes: Sequence[str] = (),
        model: AttachedModel | None = None,
    ) -> None:
        self.config = config
        self.schedule = make_schedule(config)
        self.task = find_task(config)
        self.data = ProcessData(config, classes)
        self.model = model or AttachedModel(config, self.data)

    def train_client(
        self,
        client: int,
        state: State,
        phase: Phase,
        server_round: int,
        until: float = math.inf,
        noise_multiplier: float | None = None,
    ) -> ClientUpdate:
        """Train one client from a state, with the phase's adapter attached.

        With privacy of examples, gradients have noise of `noise_multiplier`, and no
        loss is told, which would be exact: it is 0.

        Raises
        ------
        ClientError
            If the client has no examples, its update is not finite, or it has not ended
            by the time `until` of the monotonic clock.
        """
        adapter = self.model.adapter
        examples, _ = self.data.examples(client)
        if not len(examples):
            raise ClientError("no examples")
        if is_flipped(self.config, client):
            examples = self.task.spoil(examples, self.data.classes)
        state = self._own_ranks(client, state)
        adapter.load(state)
        rng_key = (self.config.seed, server_round, client)
        backbone, recipe = self.model.backbone, phase.recipe
        loss = 0.0
        try:
            if noise_multiplier is None:
                loss = train(backbone, adapter, examples, recipe, rng_key, until)
            else:
                bound = self.config.privacy.bound(phase.adapter_type.section)
                train_privately(
                    backbone, adapter, examples, recipe, bound, noise_multiplier, until
                )
        except DeadlineError as error:
            raise ClientError(str(error)) from error
        after = adapter.state()
        update = {n: after[n].sub_(state[n]) for n in adapter.returned()}
        update = spoil_update(self.config, client, update)
        if not all(bool(tensor.isfinite().all()) for tensor in update.values()):
            raise ClientError(f"the update is not finite (loss {loss:.3g})")
        clients = self.config.clients
        units = len(examples)
        if clients.weight == "tokens":
            units = int(examples.units.sum())
        return ClientUpdate(update, loss, clients.weigh(units))

    def digest_task(
        self, index: int, fingerprint: str, base: str, state: State
    ) -> bytes:
        """Return a digest of all that a client's update follows from but its data.

        Parameters
        ----------
        index : int
            The phase's, in the schedule.
        fingerprint, base : str
            The adapter's fingerprint, and the base's digest.
        state : State
            The state that clients start from, as they read it.
        """
        facts = [flatten(self.config), index, fingerprint, base, [*sorted(state)]]
        digest = blake2b(json.dumps(facts).encode(), digest_size=32)
        for _, tensor in sorted(state.items()):
            flat = tensor.detach().cpu().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.digest()

    def evaluate_client(
        self, client: int, state: State, until: float = math.inf
    ) -> Evaluation | None:
        """Evaluate a state on a client's held-out examples; return None without any.

        Raises
        ------
        ClientError
            If it has not ended by the time `until` of the monotonic clock.
        """
        _, held = self.data.examples(client)
        if not len(held):
            return None
        self.model.adapter.load(self._own_ranks(client, state))
        try:
            return self._evaluate(held, until)
        except DeadlineError as error:
            raise ClientError(str(error)) from error

    def evaluate_test(self, state: State) -> Evaluation | None:
        """Evaluate a state on the server's test data; return None without any."""
        test = self.data.tokenised.test
        if not len(test):
            return None
        self.model.adapter.load(state)
        return self._evaluate(test)

    def _evaluate(self, examples: Examples, until: float = math.inf) -> Evaluation:
        train = self.config.train
        return evaluate(
            self.model.backbone,
            examples,
            train.precision,
            tokens=train.tokens,
            until=until,
        )

    @cached_property
    def probes(self) -> list[Probe]:
        """What the run config has the server measure besides; see `Task.probes`."""
        run = self.config.run
        if not (run.generate or run.choices):
            return []
        asked = self.data.tokenised.asked
        return self.task.probes(self.config, self.data.encoder, asked)

    def probe(self, state: State) -> dict[str, float]:
        """Return what `probes` measure of a state."""
        if not self.probes:
            return {}
        self.model.adapter.load(state)
        backbone, found = self.model.backbone, dict[str, float]()
        model = backbone.model.eval()
        with (
            torch.inference_mode(),
            precision_of(backbone, self.config.train.precision),
        ):
            for probe in self.probes:
                found |= probe(model)
        return found

    def sample_test(self) -> list[Sample]:
        """Return what the model says, as it is now, to some of the test data."""
        backbone = self.model.backbone
        with (
            torch.inference_mode(),
            precision_of(backbone, self.config.train.precision),
        ):
            return self.task.sample(
                backbone.model.eval(), self.data.encoder, self.data.tokenised.test
            )

    def _own_ranks(self, client: int, state: State) -> State:
        """Return low-rank factors cut to a client's rank, other states unchanged."""
        adapter = self.model.adapter
        rank_of = adapter.client_ranks(self.config)
        return adapter.cut(state, rank_of(client)) if rank_of else state
