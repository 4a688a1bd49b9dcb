"""Client-level differential privacy: bounds, noise, cohorts, what it has cost."""

import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_flwr.aggregation.clipped import ClippedMean
from slora_flwr.aggregation.mean import SCALE, FoldError, Mean
from slora_flwr.client.process import make_process
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, parse
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.reports.page import render
from slora_flwr.reports.run_page import report
from slora_flwr.runs.reader import read_run
from slora_flwr.runs.release import KEPT, RELEASED
from slora_flwr.server.privacy import Privacy
from slora_flwr.server.run import run
from slora_flwr.server.strategy import TooFewRepliesError
from slora_flwr.wire.clipping import clip
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.messages import Report
from slora_flwr.wire.packing import pack
from tests.support.grids import RUN_IDS, RecordingGrid, Tamper, put, set_to, values
from tests.support.runs import (
    Config,
    differ,
    elsewhere,
    events,
    facts,
    final,
    make_config,
    summary,
)

# Bounds that the updates of these runs exceed by far, so that all are clipped.
BOUND, SPARSE_BOUND = 0.02, 0.05
PRIVATE: Config = {
    "method": "slora",
    "clients.per-round": 4,
    "privacy.noise-multiplier": 1.0,
    "privacy.clip-norm": BOUND,
    "privacy.sparse-clip-norm": SPARSE_BOUND,
    # Six clients are too few for the default.
    "privacy.delta": 0.01,
}


@pytest.fixture
def config(corpus: Path, tiny_models: dict[str, Path], tmp_path: Path) -> Config:
    return make_config(corpus, tiny_models["bert"], tmp_path / "run") | PRIVATE


class Grid(RecordingGrid):
    """A recording grid whose runs have ids of their own."""

    def __init__(
        self, config: Config, nodes: int = 1, tampers: dict[int, Tamper] | None = None
    ) -> None:
        super().__init__(config, nodes, tampers)
        InlineGrid.__init__(self, config, nodes, next(RUN_IDS))


def start(config: Config, grid: InlineGrid, seed: int = 0) -> Path:
    run(grid, config, run_id=1, generator=np.random.default_rng(seed))
    return Path(str(config["run.dir"]))


def privacy(changes: Config | None = None, seed: int | None = 0) -> Privacy:
    keys: Config = {
        "privacy.clip-norm": 1.0,
        "privacy.noise-multiplier": 1.0,
        "clients.count": 1000,
        "clients.per-round": 50,
    }
    generator = None if seed is None else np.random.default_rng(seed)
    return Privacy(parse(keys | (changes or {})), generator)


# What it costs


def renyi(order: int, rate: float, noise: float) -> float:
    """The sampled Gaussian's divergence (arXiv 1908.10530, section 3.3)."""
    terms = [
        math.log(math.comb(order, k))
        + (k * math.log(rate) if k else 0.0)
        + ((order - k) * math.log1p(-rate) if k < order else 0.0)
        + (k * k - k) / (2 * noise**2)
        for k in range(0 if rate < 1 else order, order + 1)
    ]
    return float(np.logaddexp.reduce(terms)) / (order - 1)


def spent(rate: float, noise: float, rounds: int, delta: float) -> float:
    """Epsilon by the best whole order, converted as arXiv 2004.00010 does."""
    return min(
        rounds * renyi(a, rate, noise)
        + math.log1p(-1 / a)
        - math.log(delta * a) / (a - 1)
        for a in range(2, 200)
    )


@pytest.mark.parametrize(
    ("count", "per_round", "noise", "rounds"),
    [(1000, 50, 2.0, 12), (1000, 50, 3.0, 100), (500, 500, 20.0, 10)],
)
def test_epsilon_against_the_formula(
    count: int, per_round: int, noise: float, rounds: int
) -> None:
    keys: Config = {"clients.count": count, "clients.per-round": per_round}
    found = privacy(keys | {"privacy.noise-multiplier": noise})
    assert found.delta == count**-1.1
    expected = spent(per_round / count, noise, rounds, found.delta)
    # Orders between the whole ones can only better it.
    assert 0.99 * expected < found.epsilon(rounds) <= expected * (1 + 1e-9)


def test_epsilon_of_the_known_example() -> None:
    """MNIST at noise 1.1, batch 256, 60 epochs, delta 1e-5: 3.01 is published.

    It is TensorFlow Privacy's, by the conversion of arXiv 1702.07476; the one of arXiv
    2004.00010 gives less of the same divergences.
    """
    rate, rounds, delta = 256 / 60000, 60 * 60000 // 256, 1e-5
    old = min(
        rounds * renyi(a, rate, 1.1) - math.log(delta) / (a - 1) for a in range(2, 64)
    )
    assert old == pytest.approx(3.01, abs=0.01)
    keys: Config = {"clients.count": 60000, "clients.per-round": 256}
    keys |= {"privacy.noise-multiplier": 1.1, "privacy.delta": delta}
    found = privacy(keys).epsilon(rounds)
    assert found == pytest.approx(spent(rate, 1.1, rounds, delta), rel=0.01)
    assert 2.5 < found < old


@pytest.mark.parametrize("target", [0.5, 8.0, 200.0])
def test_a_target_gives_the_least_noise(target: float) -> None:
    keys: Config = {"privacy.noise-multiplier": 0.0, "privacy.epsilon": target}
    found = privacy(keys)
    assert 0.999 * target < found.epsilon(12) <= target
    assert spent(0.05, found.noise_multiplier, 12, found.delta) >= 0.99 * target


def test_the_accountant_leaves_logging_alone() -> None:
    """In a process of its own, since pytest has handlers already."""
    script = """if True:
        import logging
        from slora_flwr.config import parse
        from slora_flwr.server.privacy import Privacy
        keys = {"privacy.epsilon": 200.0, "privacy.clip-norm": 1.0}
        keys["privacy.delta"] = 0.01
        print(Privacy(parse(keys)).epsilon(12))
        assert logging.getLogger().handlers == []
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 199.0 < float(done.stdout) <= 200.0
    assert done.stderr == ""


def test_a_run_ends_at_its_target(config: Config) -> None:
    config |= {"privacy.noise-multiplier": 0.0, "privacy.epsilon": 4.0, "rounds": 5}
    directory = start(config, InlineGrid(config))
    told = [event["epsilon"] for event in events(directory, "round")]
    assert told == sorted(told)
    assert 3.99 < told[-1] <= 4.0
    guarantee = summary(directory)["privacy"]
    assert guarantee["epsilon"] == told[-1]
    assert guarantee["delta"] == 0.01
    page = dict(report(read_run(directory)).figures)
    assert page["epsilon, at delta 0.01"] == "4.00"


# The bound


@settings(max_examples=60)
@given(
    update=st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4),
    bound=st.floats(1e-3, 1e3),
)
def test_no_client_exceeds_the_bound(update: list[float], bound: float) -> None:
    fold = ClippedMean(bound, expected=1)
    parts = {"a": torch.tensor(update[:3]), "b": torch.tensor([update[3:]])}
    fold.add(parts, weight=7)
    sums = [int(i) for t in fold.sums.values() for i in t.flatten()]
    norm = math.hypot(*update)
    # In whole numbers, with what float64 may have rounded in the factor.
    assert math.sqrt(sum(i * i for i in sums)) <= bound * SCALE * (1 + 1e-15) + 1e-6
    factor = min(1.0, bound / norm) if norm else 1.0
    for found, given_ in zip(sums, update, strict=True):
        assert found / SCALE == pytest.approx(given_ * factor, rel=1e-6, abs=2 / SCALE)


def test_clipping_is_of_all_values_together() -> None:
    update = {"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0])}
    found = clip(update, 1.0)
    torch.testing.assert_close(found["a"], torch.tensor([0.6]))
    torch.testing.assert_close(found["b"], torch.tensor([0.0, 0.8]))
    assert not differ(clip(update, 5.0), update)
    zero = {"a": torch.zeros(3)}
    assert not differ(clip(zero, 1.0), zero)


def test_the_sum_is_divided_by_the_clients_expected() -> None:
    fold = ClippedMean(10.0, expected=4)
    fold.add({"x": torch.tensor([1.0, 2.0])}, weight=100)
    fold.add({"x": torch.tensor([3.0, -6.0])}, weight=1)
    assert fold.result()["x"].tolist() == [1.0, -1.0]
    assert fold.weight == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(FoldError):
        ClippedMean(1.0, 1).add({"x": torch.tensor([1.0, value])}, 1)


def test_every_update_of_a_run_is_within_its_phase_s_bound(config: Config) -> None:
    config |= {"clients.per-round": 6}
    grid = Grid(config, nodes=6)
    start(config, grid)
    assert len(grid.reports) == 18
    for found in grid.reports:
        bound = SPARSE_BOUND if found.server_round == 1 else BOUND
        assert float(values(found).double().norm()) == pytest.approx(bound, rel=1e-5)


CODED: dict[str, Config] = {
    "plain": {},
    "int4": {"upload.dtype": "int4"},
    "all": {"upload.dtype": "int8", "upload.top-k": 0.1, "upload.lossless": True},
    "ffa": {"lora.aggregator": "ffa"},
    "alternate": {"lora.aggregator": "alternate"},
    "redrawn": {"sparse.schedule": "per-round"},
    "momentum": {"server.optimizer": "fedavgm"},
    "bitfit": {"method": "bitfit"},
}


@pytest.mark.parametrize("name", CODED)
def test_nodes_change_neither_cohorts_nor_noise(config: Config, name: str) -> None:
    """So the bound that holds for updates by themselves holds for those of a fold."""
    config |= CODED[name] | {"sparse.rounds": 2, "rounds": 4}
    found = []
    for nodes in (1, 3, 6):
        config = elsewhere(config)
        directory = start(config, Grid(config, nodes))
        assert events(directory, "failure") == []
        found.append((final(directory), events(directory, "round")))
    for state, rounds in found[1:]:
        assert not differ(state, found[0][0])
        assert [e["cohort"] for e in rounds] == [e["cohort"] for e in found[0][1]]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_coding_does_not_break_the_bound(share: float) -> None:
    """Four bits make an update of few large values longer; the fold does not."""
    codec = Codec("int4", share)
    update = torch.full((128,), 0.06)
    update[0] = 0.7
    update *= 0.999 / update.norm()
    chosen = np.arange(32, dtype=np.int64) if share else None
    array = codec.encode({"x": update}, chosen)
    longer = codec.decode(array, {"x": (128,)})["x"].norm() > 1.0
    assert longer or share
    fold = ClippedMean(1.0, expected=1, codec=codec)
    fold.take(array, {"x": (128,)}, clients=[3], weights=[5])
    assert 0.4 < float(fold.result()["x"].double().norm()) <= 1.0 + 1e-7


def longer(report: Report) -> None:
    report.update = pack({"x": values(report) * 1e4})


def leave_out_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let noise be 0 throughout: sums are then seen as they are."""
    perturb = ClippedMean.perturb

    def perturb_by_nothing(self: ClippedMean, _: float, *others: Any) -> None:
        perturb(self, 0.0, *others)

    monkeypatch.setattr(ClippedMean, "perturb", perturb_by_nothing)


def test_the_server_clips_what_a_node_of_one_client_did_not(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_noise(monkeypatch)
    config |= {"clients.per-round": 6, "rounds": 2}
    found = []
    for tampers in ({}, {2: longer}):
        tampered: dict[int, Tamper] = dict(tampers)
        config = elsewhere(config)
        grid = Grid(config, nodes=6, tampers=tampered)
        found.append(final(start(config, grid)))
    error = [(found[0][n] - t).double().norm() ** 2 for n, t in found[1].items()]
    assert math.sqrt(sum(error)) < 1e-6


@pytest.mark.parametrize("share", [1.0, 1.0001])
def test_a_sum_is_as_long_as_its_clients_bounds_at_most(share: float) -> None:
    clients, bound = [3, 4, 8], 0.5
    sums = torch.tensor([0.6, 0.8], dtype=torch.float64) * (share * 1.5 * SCALE)
    node = Mean()
    node.merge({"x": sums.trunc().long()}, len(clients))
    fold = ClippedMean(bound, expected=4)
    fold.add({"x": torch.tensor([0.5, 0.5])}, weight=1)
    before = fold.result()["x"]
    # Weights are numbers of examples, by which nobody may reach further.
    taken = (node.packed(), {"x": (2,)}, clients, [50, 60, 70])
    if share == 1.0:
        fold.take(*taken)
        assert fold.weight == 4
        return
    with pytest.raises(FoldError) as caught:
        fold.take(*taken)
    assert str(caught.value) == (
        "its sum has norm 1.50015; allowed: up to 1.5, 3 times the bound of 0.5 that "
        "privacy sets"
    )
    assert torch.equal(fold.result()["x"], before)
    assert fold.weight == 1


def ten_times(report: Report) -> None:
    put(report, values(report) * 10)


def test_a_node_of_several_clients_that_does_not_clip_is_left_out(
    config: Config,
) -> None:
    config |= {"clients.per-round": 6, "clients.min-replies": 1}
    directory = start(config, Grid(config, nodes=2, tampers={2: ten_times}))
    (failure,) = events(directory, "failure")
    assert failure["round"] == 2
    assert len(failure["clients"]) == 3
    assert f"3 times the bound of {BOUND:g} that privacy sets" in failure["reason"]
    assert [event["replied"] for event in events(directory, "round")] == [6, 3, 6]


def test_clients_weigh_one(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise, the state moves by the sum of the updates over the expected."""
    leave_out_noise(monkeypatch)
    config |= {"method": "lora"}
    config |= {"clients.partitioner": "dirichlet", "clients.alpha": 0.5}
    grid = Grid(config, nodes=6)
    start(config, grid)
    reports = [r for r in grid.reports if r.server_round == 1]
    assert len({r.examples[0] for r in reports}) > 1
    total = torch.stack([values(r).double() for r in reports]).sum(dim=0) / 4
    moved = grid.sent(2) - grid.sent(1)
    torch.testing.assert_close(moved, total.float(), rtol=0.0, atol=1e-6)


# The noise


def noised(fold: ClippedMean, multiplier: float, seed: int, **shapes: int) -> State:
    layout = {name: (size,) for name, size in shapes.items()}
    fold.perturb(multiplier, layout, np.random.default_rng(seed))
    return fold.result()


def test_noise_is_as_wide_as_it_should_be() -> None:
    fold = ClippedMean(bound=2.0, expected=10)
    fold.add({"x": torch.full((40_000,), 1e-3), "y": torch.full((40_000,), -1e-3)}, 1)
    before = fold.result()
    after = noised(fold, 1.5, 0, x=40_000, y=40_000)
    x, y = ((after[name] - before[name]).double() for name in ("x", "y"))
    # Of 40,000 values the deviation is known to 0.35%, and its mean to 0.0015.
    for noise in (x, y):
        assert float(noise.std()) == pytest.approx(1.5 * 2.0 / 10, rel=0.015)
        assert abs(float(noise.mean())) < 0.006
        share = float((noise.abs() < 0.3).double().mean())
        assert share == pytest.approx(0.6827, abs=0.01)
    assert abs(float((x * y).mean())) < 0.09 * 0.025
    assert fold.weight == 1


def test_noise_of_a_run_is_on_all_that_is_sent(config: Config) -> None:
    """Two runs that differ in the noise alone differ as two such noises do."""
    config |= {"clients.per-round": 6, "rounds": 2, "privacy.noise-multiplier": 3.0}
    moved = []
    for seed in (1, 2):
        config = elsewhere(config)
        grid = Grid(config)
        start(config, grid, seed)
        # The second phase starts from what the first one's noise left.
        moved.append(final(Path(str(config["run.dir"]))))
    head = [n for n in moved[0] if "lora" not in n]
    apart = torch.cat([(moved[0][n] - moved[1][n]).flatten() for n in head]).double()
    # Each has the noise of both phases: the deviations add by their squares.
    both = math.hypot(SPARSE_BOUND, BOUND)
    expected = math.sqrt(2) * 3.0 * both / 6
    assert float(apart.std()) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("s", [0.4, 0.8])
def test_noise_in_both_factors_gives_a_quadratic_term(s: float) -> None:
    """A frozen: m·|A|²·s². Both: n·|B|²·s² and m·n·r·s⁴ more."""
    m, n, r = 30, 20, 4
    draw = np.random.default_rng(3)
    a, b = draw.normal(size=(r, n)), draw.normal(size=(m, r))
    frozen, both = [], []
    for seed in range(300):
        fold = ClippedMean(bound=1.0, expected=1)
        noise = noised(fold, s, seed, a=r * n, b=m * r)
        e = noise["a"].double().numpy().reshape(r, n)
        f = noise["b"].double().numpy().reshape(m, r)
        frozen.append(np.square((b + f) @ a - b @ a).sum())
        both.append(np.square((b + f) @ (a + e) - b @ a).sum())
    linear = m * np.square(a).sum() * s**2
    more = n * np.square(b).sum() * s**2
    assert np.mean(frozen) == pytest.approx(linear, rel=0.03)
    assert np.mean(both) == pytest.approx(linear + more + m * n * r * s**4, rel=0.03)


# Who is drawn


def test_cohorts_are_drawn_client_by_client() -> None:
    found = privacy()
    cohorts = [found.draw(range(1000), number) for number in range(1, 201)]
    sizes = [len(cohort) for cohort in cohorts]
    # Binomial: 50 with variance 47.5, of which 200 draws tell 10%.
    assert np.mean(sizes) == pytest.approx(50, abs=2)
    assert np.var(sizes) == pytest.approx(47.5, rel=0.35)
    times = np.bincount(np.concatenate(cohorts), minlength=1000)
    assert np.var(times) == pytest.approx(200 * 0.05 * 0.95, rel=0.2)
    assert all(cohort == sorted(set(cohort)) for cohort in cohorts)


def test_a_client_s_draw_does_not_depend_on_the_others() -> None:
    found = privacy()
    for number in (1, 2):
        whole = found.draw(range(1000), number)
        online = [*range(999, 0, -3)]
        assert found.draw(online, number) == [c for c in whole if c in online]
        assert found.draw(range(1000), number) == whole


def test_all_are_drawn_where_all_are_expected() -> None:
    found = privacy({"clients.per-round": 1000})
    assert found.draw(range(1000), 1) == list(range(1000))


def test_the_seed_tells_neither_cohorts_nor_noise() -> None:
    draws, noises = [], []
    for _ in range(2):
        found = privacy(seed=None)
        draws.append(found.draw(range(1000), 1))
        fold = ClippedMean(1.0, 1)
        found.perturb(fold, {"x": (3,)})
        noises.append(fold.result())
    assert draws[0] != draws[1]
    assert differ(noises[0], noises[1])


def test_a_round_of_nobody_is_a_round(config: Config) -> None:
    config |= {"clients.per-round": 1, "rounds": 6, "sparse.rounds": 3}
    directory = start(config, InlineGrid(config))
    rounds = events(directory, "round")
    cohorts = [event["cohort"] for event in rounds]
    assert [] in cohorts
    assert len(cohorts) == 6
    # Nobody's mean loss is not a number, and so not in the line.
    assert all(("train_loss" in event) == (event["cohort"] != []) for event in rounds)
    assert render(report(read_run(directory)))
    assert all(bool(t.isfinite().all()) for t in final(directory).values())


def test_a_round_that_is_held_again_has_the_same_cohort(config: Config) -> None:
    config |= {"clients.min-replies": 4}
    grid = Grid(config, nodes=2, tampers={1: set_to(phase=9)})
    with pytest.raises(TooFewRepliesError):
        start(config, grid)
    assert [asked.server_round for asked in grid.asked] == [1, 1, 1, 1]
    cohorts = [asked.clients for asked in grid.asked]
    assert cohorts[:2] == cohorts[2:]


# What may leave the server


class Cohorts(np.random.Generator):
    """The same noise each time, and cohorts by a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(0))
        self._cohorts = np.random.default_rng(seed)

    def bytes(self, length: int) -> bytes:
        return self._cohorts.bytes(length)


class Blank(Grid):
    """Nodes whose updates are zero whoever trains, so that states are noise alone."""

    def __init__(self, config: Config, loss: float, tampers: dict[int, Tamper]) -> None:
        super().__init__(config, 2, tampers)
        self._loss = loss

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if message.metadata.message_type == MessageType.TRAIN:
            found = Report.read(reply.content)
            put(found, torch.zeros_like(values(found)))
            found.losses = [self._loss for _ in found.losses]
            found.seconds = [self._loss for _ in found.seconds]
            reply.content = found.content()
        return reply


def released(directory: Path) -> dict[str, Any]:
    """Return the content of the files that may leave the server, by name."""
    content: dict[str, Any] = {}
    for name in RELEASED:
        path = directory / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            content[file.relative_to(directory).as_posix()] = file.read_bytes()
    for name in content:
        if name.endswith(".safetensors"):
            # Its metadata have no order.
            stem = f"../{name.removesuffix('.safetensors')}"
            state = final(directory, stem)
            tensors = {n: t.numpy().tobytes() for n, t in state.items()}
            content[name] = tensors, facts(directory, stem)
    return content


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "bitfit"},
        {"lora.aggregator": "ffa", "sparse.schedule": "per-round"},
        {"download.dtype": "int8", "download.lossless": True},
        {"sparse.rounds": 0, "server.optimizer": "fedadam", "server.lr": 0.1},
    ],
    ids=["slora", "bitfit", "ffa", "coded", "open"],
)
def test_nothing_released_depends_on_who_was_drawn_or_on_figures_without_noise(
    config: Config,
    changes: Config,
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two runs have other data, cohorts, losses and failures, and the same states."""
    texts, directory = tmp_path / "texts.csv", Path(str(config["run.dir"]))
    config |= {"data.name": str(texts), "data.test": str(corpus)}
    config |= {"rounds": 6, "sparse.rounds": 3, "clients.per-round": 2} | changes
    rows = corpus.read_text().splitlines(keepends=True)
    caplog.set_level(logging.INFO, "flwr")
    public, secret = [], []
    for name, size, seed, loss in (("one", 161, 1, 0.5), ("other", 101, 5, 12.5)):
        texts.write_text("".join(rows[:size]))
        make_process.cache_clear()  # as in a new process
        tampers: dict[int, Tamper] = {} if seed == 1 else {5: set_to(phase=9)}
        run(Blank(config, loss, tampers), config, 1, Cohorts(seed))
        lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
        printed = capsys.readouterr().out
        caplog.clear()
        public.append(released(directory) | {"log": lines, "printed": printed})
        secret.append(events(directory, "round"))
        (directory / "report.html").write_text(render(report(read_run(directory))))
        top = {path.name + "/" * path.is_dir() for path in directory.iterdir()}
        assert top <= {*RELEASED, *KEPT}
        directory.rename(tmp_path / name)
    one, other = public
    assert one.keys() == other.keys()
    assert [name for name, content in one.items() if content != other[name]] == []
    # As much is there, and as much differs, as there could be.
    assert "checkpoints/last.safetensors" in one
    assert any(name.startswith(("adapter/", "model/")) for name in one)
    assert sum("epsilon" in line for line in one["log"]) == 7
    for figure in ("cohort", "replied", "train_loss", "payload_bytes"):
        assert [e.get(figure) for e in secret[0]] != [e.get(figure) for e in secret[1]]
    assert [e["accuracy"] for e in secret[0]] == [e["accuracy"] for e in secret[1]]
    assert events(tmp_path / "other", "failure")


# What cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy.clip-norm": 0.0}, "privacy.clip-norm is 0.0; allowed: a number abo"),
        ({"privacy.epsilon": 1.0}, "privacy.epsilon is 1.0; allowed: 0, since privac"),
        ({"clients.count": 0}, "clients.count is 0; allowed: at least 2, since privac"),
        ({"clients.holdout": 0.1}, "clients.holdout is 0.1; allowed: 0, since"),
        ({"lora.ranks": "1,2"}, "lora.ranks is '1,2'; allowed: empty, since"),
        ({"server.clip-norm": 1.0}, "server.clip-norm is 1.0; allowed: 0.0, since"),
        (
            {"server.robust": "median", "clients.min-replies": 1},
            "server.robust is 'median'; allowed: none, since",
        ),
        ({"run.resume": "/runs/a"}, "run.resume is '/runs/a'; allowed: empty, since"),
        (
            {"method": "fedex-lora"},
            "method is 'fedex-lora'; allowed: aggregator fedavg, ffa, alternate, since",
        ),
        (
            {"lora.aggregator": "flexlora"},
            "lora.aggregator is 'flexlora'; allowed: aggregator fedavg, ffa, altern",
        ),
        (
            {"privacy.delta": 0.0},
            "privacy.delta is 0.0; allowed: above 0 up to 0.01 and below 0.05, which "
            "is 1 / clients.count, for 20 clients; 0 stands for 20 ** -1.1 = 0.0371",
        ),
        (
            {"clients.count": 65, "privacy.delta": 0.0},
            "privacy.delta is 0.0; allowed: above 0 up to 0.01 and below 0.01538, "
            "which is 1 / clients.count, for 65 clients; 0 stands for 65 ** -1.1 = ",
        ),
        (
            {"clients.count": 500, "privacy.delta": 0.0021},
            "privacy.delta is 0.0021; allowed: above 0 up to 0.01 and below 0.002, ",
        ),
    ],
)
def test_what_has_no_guarantee_is_refused(changes: Config, message: str) -> None:
    good: Config = {"privacy.noise-multiplier": 1.0, "privacy.clip-norm": 1.0}
    good["privacy.delta"] = 0.01
    parse(good)
    with pytest.raises(ConfigError) as caught:
        parse(good | changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("count", "delta"), [(66, 0.0), (500, 0.0019), (20, 0.01)])
def test_a_delta_within_both_limits_is_taken(count: int, delta: float) -> None:
    keys: Config = {"clients.count": count, "clients.per-round": 10}
    found = privacy(keys | {"privacy.delta": delta})
    assert found.delta == (delta or count**-1.1)
