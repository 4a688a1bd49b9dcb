"""Whole runs whose clients add noise in shares, so that the server sees none without.

The tests' updates have far fewer values than real ones, and there are six clients.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from numpy.typing import NDArray

from slora_flwr.aggregation import ring_sum
from slora_flwr.aggregation.ring_sum import NAMES, Numbers, RingSum
from slora_flwr.client.process import make_process
from slora_flwr.config import parse
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.privacy import discrete_gaussian
from slora_flwr.privacy.shares import epsilon_of, noise_multiplier
from slora_flwr.reports.page import render
from slora_flwr.reports.run_page import report
from slora_flwr.runs.reader import read_run
from slora_flwr.secure import member, tally
from slora_flwr.secure.ring import FIGURES
from slora_flwr.server.client_noise import ClientNoise
from slora_flwr.server.strategy import TooFewRepliesError
from slora_flwr.training.trainer import ClientUpdate, Trainer
from slora_flwr.wire.messages import END
from slora_flwr.wire.secure_messages import TELL
from slora_flwr.wire.state_channel import Upload
from tests.app.test_secure import TRAIN, SecretGrid
from tests.support.runs import Config, differ, elsewhere, events, final, start, summary
from tests.support.secure import SHARED


@pytest.fixture
def shared(config: Config) -> Config:
    return config | SHARED | {"server.average": "none", "upload.feedback": False}


@pytest.fixture
def known_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which each run draws the same noise as the last."""

    def rewind() -> None:
        stream = np.random.Philox(5)

        def draw(std: float, count: int, words: object) -> NDArray[np.int64]:
            return discrete_gaussian.draw(std, count, lambda n: stream.random_raw(n))

        monkeypatch.setattr(ring_sum, "draw", draw)

    return rewind


@pytest.mark.parametrize("method", ["slora", "lora", "ffa-lora", "sft", "head"])
def test_masks_change_nothing(
    shared: Config,
    known_noise: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    config = shared | {"method": method}
    known_noise()
    masked = start(config, SecretGrid(config))
    for module in (member, tally):
        monkeypatch.setattr(module, "add_mask", lambda *_: None)
    known_noise()
    other = elsewhere(config)
    plain = start(other, SecretGrid(other))
    assert not differ(final(masked), final(plain))


@pytest.mark.parametrize("nodes", [3, 6])
def test_the_state_has_the_noise_of_all_shares(shared: Config, nodes: int) -> None:
    """Six shares, each of which is a third of what three sharers need.

    The rotation keeps lengths, so the noise of the state is as long as that of the sum.
    """
    config = shared | {"rounds": 1, "train.lr": 1e-12}
    parsed = parse(config)
    assert parsed.sharers == 3  # of four replies one may be of a colluding client
    quiet = elsewhere(config) | {"privacy.noise-multiplier": 0.001}
    before = final(start(quiet, SecretGrid(quiet, nodes=nodes)))
    after = final(start(config, SecretGrid(config, nodes=nodes)))
    count = sum(tensor.numel() for tensor in after.values())
    numbers = Numbers.of(parsed, "lora", count)
    moved = torch.cat([(after[n] - before[n]).flatten() for n in after]).double()
    bound = 0.5 * numbers.grid.sensitivity * numbers.grid.step / numbers.grid.bound
    expected = math.sqrt(6 / 3) * bound / 6
    assert noise_multiplier(parsed) == 1.0
    # Seven standard errors of a standard deviation.
    allowed = 7 / math.sqrt(2 * count)
    assert float(moved.std()) == pytest.approx(expected, rel=allowed)
    assert abs(float(moved.mean())) < 7 * expected / math.sqrt(count)


def test_no_sum_is_known_without_noise(
    shared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node's masked numbers without their masks, against those without noise."""
    for module in (member, tally):
        monkeypatch.setattr(module, "add_mask", lambda *_: None)
    config = shared | {"rounds": 1}
    grid = SecretGrid(config, nodes=3)
    start(config, grid)
    monkeypatch.setattr(RingSum, "perturb", lambda *_: None)
    silent = elsewhere(config)
    other = SecretGrid(silent, nodes=3)
    start(silent, other)
    count = sum(t.numel() for t in final(Path(str(config["run.dir"]))).values())
    numbers = Numbers.of(parse(config), "lora", count)
    size, ring = numbers.grid.size, numbers.ring
    for noised, plain in zip(grid.masked, other.masked, strict=True):
        one, two = (
            ring.centred(ring.unpack(told.masked[: size * ring.item_size], size))
            for told in (noised, plain)
        )
        apart = float(np.std((one - two).astype(float)))
        # Two clients on each of three nodes.
        allowed = 7 / math.sqrt(2 * size)
        assert apart == pytest.approx(numbers.std * math.sqrt(2), rel=allowed)


def test_figures_of_data_are_left_out(shared: Config) -> None:
    config = shared | {"rounds": 1}
    grid = SecretGrid(config)
    opened: list[Any] = []
    directory = start(config, grid)
    for event in events(directory, "round"):
        assert event.get("train_loss") is None
        assert not event["clients"]
        opened.append(event["epsilon"])
    assert opened == [pytest.approx(epsilon_of(parse(config), 1))]
    render(report(read_run(directory)))


def test_the_fold_sums_no_figure_but_counts(shared: Config) -> None:
    fold = RingSum(parse(shared), "lora", {"w": (50,)})
    state = {"w": torch.full((50,), 0.01)}
    array = fold.grid.encode(state, stream=np.random.Philox(1))
    for client in range(2):
        upload = Upload(array, state, 0.07)
        fold.add_upload(upload, weight=40, client=client, loss=2.5)
    assert fold.figures.dtype == FIGURES
    assert dict(zip(NAMES, fold.figures.tolist(), strict=True)) == {
        "clients": 2,
        "weight": 2,
        "loss": 0,
        "norm": 0,
        "clipped": 0,
    }


def test_noise_suffices_with_as_many_lost_as_may_be(shared: Config) -> None:
    """Two of six clients are lost, one on each stage; four are enough."""
    config = shared | {"rounds": 2, "secure.threshold": 0.5}
    lost = {(1, TRAIN): {2}, (2, TELL): {3}, (2, TRAIN): {1}}
    directory = start(config, SecretGrid(config, nodes=6, lost=lost))
    assert [e["replied"] for e in events(directory, "round")] == [5, 5]
    facts = summary(directory)["privacy"]
    assert facts["epsilon"] == pytest.approx(epsilon_of(parse(config), 2))


def test_a_round_of_fewer_is_never_read(shared: Config) -> None:
    config = shared | {"rounds": 2, "secure.threshold": 0.5, "clients.min-replies": 5}
    grid = SecretGrid(config, nodes=6, lost={(1, TRAIN): {1, 2}})
    with pytest.raises(TooFewRepliesError, match="4 clients are in the sum"):
        start(config, grid)
    assert TELL not in grid.kinds


def test_clients_take_turns_and_none_exceeds_its_rounds(shared: Config) -> None:
    """Four of six in each of six rounds: four rounds for each client, by hand."""
    config = shared | {"rounds": 6, "clients.per-round": 4}
    directory = start(config, SecretGrid(config, nodes=2))
    cohorts = [event["cohort"] for event in events(directory, "round")]
    assert [len(cohort) for cohort in cohorts] == 6 * [4]
    assert Counter(c for cohort in cohorts for c in cohort) == dict.fromkeys(
        range(6), 4
    )
    assert summary(directory)["privacy"]["epsilon"] == pytest.approx(
        epsilon_of(parse(config), 4)
    )


def test_a_node_refuses_a_client_that_has_done_its_rounds(
    shared: Config,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the server asks: here it lets the same four train in each round."""
    make_process.cache_clear()
    monkeypatch.setattr(ClientNoise, "draw", lambda *_: [0, 1, 2, 3])
    config = shared | {"rounds": 6, "clients.per-round": 4}
    with pytest.raises(TooFewRepliesError, match="round 5"):
        start(config, SecretGrid(config, nodes=2))
    assert "it took part in 4 rounds; allowed: up to 4" in caplog.text
    failed = {e["reason"] for e in events(Path(str(config["run.dir"])), "failure")}
    assert all("took part" not in reason for reason in failed)


def test_a_round_that_is_tried_again_counts_once(shared: Config) -> None:
    """All clients are needed in each of three rounds, and the first is held twice."""

    class Once(SecretGrid):
        """Half of the nodes are lost in the first attempt alone."""

        def _answer(self, message: Message) -> Message:
            if self.kinds.count(TRAIN) >= 6:
                self._lost = {}
            return super()._answer(message)

    config = shared | {"rounds": 3, "clients.min-replies": 6}
    directory = start(config, Once(config, nodes=6, lost={(1, TRAIN): {1, 2, 3}}))
    assert [event["replied"] for event in events(directory, "round")] == [6, 6, 6]
    assert parse(config).participations == 3


def test_a_cohort_of_too_few_is_not_asked(
    shared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClientNoise, "draw", lambda *_: [0, 1, 2])
    grid = SecretGrid(shared, nodes=3)
    with pytest.raises(TooFewRepliesError, match="3 clients can take part"):
        start(shared, grid)
    assert {*grid.kinds} <= {"query", END}


def test_words_of_an_unexpected_error_stay_on_the_node(
    shared: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train = Trainer.train_client

    def fail(self: Trainer, client: int, *given: Any) -> ClientUpdate:
        if client == 2:
            raise ValueError("row 17: 'the patient has gout' is too long")
        return train(self, client, *given)

    monkeypatch.setattr(Trainer, "train_client", fail)
    config = shared | {"rounds": 1, "privacy.noise-multiplier": 2.0}
    directory = start(config, SecretGrid(config, nodes=3))
    written = (directory / "events.jsonl").read_text()
    assert "gout" in caplog.text  # the node's own, which is in this process
    assert "gout" not in written
    assert "it failed; its node's log says why" in written
    # Its node's other client is in the sum.
    assert [event["replied"] for event in events(directory, "round")] == [5]


def test_no_checkpoint_is_kept(shared: Config) -> None:
    config = shared | {"rounds": 1}
    directory = start(config, InlineGrid(config, 2))
    names = {path.name for path in directory.rglob("*")}
    assert not any("round-" in name for name in names)
