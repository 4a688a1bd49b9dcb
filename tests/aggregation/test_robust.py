"""Robust statistics, clipping and attacks: against Flower's own, and by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.aggregation.robust import combine, krum_scores, trimmed_mean
from slora_flwr.aggregation.stack import Stack
from slora_flwr.client import handlers as node
from slora_flwr.common.tensors import State
from slora_flwr.config import ServerConfig, parse
from slora_flwr.data.examples import Examples
from slora_flwr.tasks.classification import Classification
from slora_flwr.training.attack import is_flipped, is_hostile, spoil_update
from slora_flwr.wire.clipping import clip, largest_norm, norm
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.packing import pack
from slora_flwr.wire.state_channel import write_update
from tests.support.grids import Grid, RecordingGrid, ShufflingGrid, values
from tests.support.runs import Config, differ, elsewhere, events, final, start

OUT, IN, RANK, SCALING = 70, 9, 3, 2.0
ROBUST: Config = {"server.byzantine": 1, "clients.min-replies": 5}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack_of(updates: list[State]) -> Stack:
    stack = Stack()
    for client, update in enumerate(updates):
        # Weights of no account: one could be a lie.
        stack.add(update, 1 + 999 * (client % 2), client)
    return stack


def flat(updates: list[State]) -> np.ndarray:
    vectors = [torch.cat([t.flatten() for t in u.values()]) for u in updates]
    return torch.stack(vectors).double().numpy()


# On values themselves


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), n=st.integers(3, 15), data=st.data())
def test_means_without_the_extremes_are_flowers(
    seed: int, n: int, data: st.DataObject
) -> None:
    hostile = data.draw(st.integers(0, (n - 1) // 2))
    updates = [{"a": draw(seed + i, 4, 2), "b": draw(-i - 1, 3)} for i in range(n)]
    given = ServerConfig(robust="trimmed-mean", byzantine=hostile)
    found, factors = combine(stack_of(updates), given, {}, 1.0)
    # Half a client more, since Flower rounds down.
    expected = trim_mean(flat(updates), min((hostile + 0.5) / n, 0.4999))
    np.testing.assert_allclose(flat([found])[0], expected, atol=1e-6)
    median, _ = combine(stack_of(updates), ServerConfig(robust="median"), {}, 1.0)
    np.testing.assert_allclose(
        flat([median])[0], np.median(flat(updates), axis=0), atol=1e-6
    )
    assert factors == {}


def test_the_extremes_of_each_entry_are_cut_by_hand() -> None:
    columns = torch.tensor([[1.0, 9.0], [2.0, -9.0], [30.0, 4.0], [-7.0, 6.0]])
    assert trimmed_mean(columns, 1).tolist() == [1.5, 5.0]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), hostile=st.integers(0, 3), more=st.integers(0, 4))
def test_krum_chooses_as_flower_does(seed: int, hostile: int, more: int) -> None:
    n = 2 * hostile + 3 + more
    updates = [{"a": draw(seed + i, 4, 2), "b": draw(-i - 1, 3)} for i in range(n)]
    contents = [
        RecordDict({"arrays": ArrayRecord([row]), "client": node_of(i)})
        for i, row in enumerate(flat(updates))
    ]
    for robust, kept in (("krum", 1), ("multi-krum", n - hostile - 2)):
        chosen = select_multikrum(contents, hostile, kept)
        expected = flat([updates[client_of(content)] for content in chosen])
        given = ServerConfig(robust=robust, byzantine=hostile)
        found, _ = combine(stack_of(updates), given, {}, 1.0)
        np.testing.assert_allclose(flat([found])[0], expected.mean(axis=0), atol=1e-6)


def node_of(client: int) -> ArrayRecord:
    return ArrayRecord({"client": Array(np.array(client))})


def client_of(content: RecordDict) -> int:
    return int(content.array_records["client"]["client"].numpy())


def test_krum_scores_by_hand() -> None:
    # On a line at 0, 1, 3, 10 and 20; with one hostile, 5 - 1 - 2 = 2 neighbours.
    at = torch.tensor([0.0, 1.0, 3.0, 10.0, 20.0], dtype=torch.float64)
    scores = krum_scores(torch.outer(at, at), 1)
    assert scores.tolist() == [1 + 9, 1 + 4, 4 + 9, 49 + 81, 100 + 289]


# On the products of LoRA's factors


def lora_start() -> State:
    return {
        "m.lora_A": draw(1, RANK, IN),
        "m.lora_B": draw(2, OUT, RANK),
        "head": draw(3, 4),
    }


def lora_updates(n: int) -> list[State]:
    return [
        {name: 0.1 * draw(100 * i + j, *t.shape) for j, (name, t) in enumerate(items)}
        for i, items in enumerate([list(lora_start().items())] * n)
    ]


def product(state: State, update: State) -> np.ndarray:
    a = (state["m.lora_A"] + update["m.lora_A"]).double()
    b = (state["m.lora_B"] + update["m.lora_B"]).double()
    return (b @ a).numpy()


@pytest.mark.parametrize(("robust", "cut"), [("median", 2), ("trimmed-mean", 1)])
def test_factors_are_the_best_of_the_products_statistic(robust: str, cut: int) -> None:
    sent, updates = lora_start(), lora_updates(6)
    given = ServerConfig(robust=robust, byzantine=1)
    update, factors = combine(stack_of(updates), given, sent, SCALING)
    dense = np.sort([product(sent, u) for u in updates], axis=0)[cut : 6 - cut].mean(0)
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    found = (factors["m.lora_B"].double() @ factors["m.lora_A"].double()).numpy()
    np.testing.assert_allclose(found, best, atol=1e-5)
    heads = np.sort([u["head"].numpy() for u in updates], axis=0)[cut : 6 - cut]
    assert update.keys() == {"head"}
    np.testing.assert_allclose(update["head"], heads.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("of_head", [0.0, 30.0])
def test_krum_measures_products_and_head(of_head: float) -> None:
    sent, updates = lora_start(), lora_updates(7)
    for i, update in enumerate(updates):
        update["head"] *= of_head * i
    vectors = [
        np.concatenate([SCALING * product(sent, u).ravel(), u["head"].numpy()])
        for u in updates
    ]
    apart = np.array([[np.sum((v - w) ** 2) for w in vectors] for v in vectors])
    scores = np.sort(apart, axis=1)[:, 1 : 7 - 2 - 2 + 1].sum(axis=1)
    found, factors = combine(
        stack_of(updates), ServerConfig(robust="krum", byzantine=2), sent, SCALING
    )
    assert factors == {}
    assert not differ(found, updates[int(scores.argmin())])


def test_the_same_products_of_other_factors_are_no_distance() -> None:
    """Two clients whose factors are turned against each other are the same client."""
    sent = lora_start()
    turn, _ = torch.linalg.qr(draw(9, RANK, RANK))
    turned = {
        "m.lora_A": turn.T @ sent["m.lora_A"] - sent["m.lora_A"],
        "m.lora_B": sent["m.lora_B"] @ turn - sent["m.lora_B"],
        "head": torch.zeros(4),
    }
    still = {name: torch.zeros_like(t) for name, t in sent.items()}
    far = [{n: (2.0 + i) * draw(i, *t.shape) for n, t in sent.items()} for i in (1, 2)]
    _, factors = combine(
        stack_of([still, turned, far[0]]), ServerConfig(robust="median"), sent, 1.0
    )
    # Two of three agree on each entry, so that it is theirs.
    found = factors["m.lora_B"] @ factors["m.lora_A"]
    torch.testing.assert_close(
        found, sent["m.lora_B"] @ sent["m.lora_A"], atol=1e-4, rtol=0
    )
    chosen, _ = combine(
        stack_of([*far, still, turned]), ServerConfig(robust="krum"), sent, 1.0
    )
    assert not differ(chosen, still) or not differ(chosen, turned)


@pytest.mark.parametrize("name", ["m.lora_A", "m.lora_B"])
def test_a_factor_alone_is_compared_entry_by_entry(name: str) -> None:
    """With `ffa` and `alternate`, whose other factor is common to all."""
    sent = lora_start()
    updates = [{n: u[n] for n in (name, "head")} for u in lora_updates(5)]
    found, factors = combine(
        stack_of(updates), ServerConfig(robust="median"), sent, SCALING
    )
    assert factors == {}
    expected = torch.stack([u[name] for u in updates]).median(dim=0).values
    torch.testing.assert_close(found[name], expected)


# Clipping


def test_a_norm_by_hand() -> None:
    update = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0], [12.0]])}
    assert norm(update) == 13.0
    assert clip(update, 13.0) is update
    assert clip(update, 0.0) is update
    half = clip(update, 6.5)
    assert half["a"].tolist() == [1.5, 0.0]
    assert half["b"].tolist() == [[2.0], [6.0]]


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 700),
    spread=st.floats(0.0, 8.0),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 1e6]),
    share=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8", "int4"]),
)
def test_what_is_read_of_a_clipped_update_is_within_the_slack(
    seed: int, count: int, spread: float, scale: float, share: float, dtype: str
) -> None:
    update = {"x": scale * draw(seed, count) * (spread * draw(seed + 1, count)).exp()}
    bound = 0.5 * norm(update)
    codec = Codec(dtype, share, head=0)
    upload = write_update(
        update,
        codec,
        residual={"x": draw(seed + 2, count) * scale},
        start={},
        importance="magnitude",
        stream=np.random.Philox(key=seed),
        clip_norm=bound,
    )
    assert norm(upload.update) <= largest_norm(bound, dtype, count)
    # What was cut off does not come back.
    whole = {"x": upload.update["x"] + upload.residual.get("x", 0.0)}
    assert norm(whole) <= bound * (1 + 1e-4)


def test_the_slack_is_what_the_docs_say() -> None:
    found = {
        dtype: round(largest_norm(1.0, dtype, 0), 3)
        for dtype in ("float32", "float16", "bfloat16", "int8", "int4")
    }
    assert found == {
        "float32": 1.0,
        "float16": 1.001,
        "bfloat16": 1.008,
        "int8": 1.089,
        "int4": 2.616,
    }


@pytest.mark.parametrize("kind", [Mean, Stack])
def test_a_fold_refuses_what_is_longer(kind: Callable[..., Mean]) -> None:
    shapes = {"x": (2,)}
    fold = kind(None, Codec(), 1.0)
    fold.take(pack({"x": torch.tensor([0.6, 0.8])}), shapes, [1], [5])
    with pytest.raises(FoldError, match=r"has norm 1\.3; allowed: up to 1, since"):
        fold.take(pack({"x": torch.tensor([0.5, 1.2])}), shapes, [2], [5])
    node_fold = kind(None, Codec(), 1.0)
    node_fold.add({"x": torch.tensor([1.0, 0.0])}, 2, client=3)
    node_fold.add({"x": torch.tensor([0.8, 0.6])}, 4, client=4)
    fold.take(node_fold.packed(), shapes, [3, 4], [2, 4])
    assert fold.weight == 11
    # (5·.6 + 2·1 + 4·.8) / 11 and (5·.8 + 4·.6) / 11
    torch.testing.assert_close(fold.result()["x"], torch.tensor([8.2, 6.4]) / 11)
    node_fold.add({"x": torch.tensor([5.0, 0.0])}, 2, client=5)
    with pytest.raises(FoldError, match=r"server\.clip-norm is 1"):
        fold.take(node_fold.packed(), shapes, [3, 4, 5], [2, 4, 2])


def test_of_a_sum_only_the_mean_is_bounded_and_of_updates_each() -> None:
    shapes = {"x": (1,)}
    for kind, refused in ((Mean, False), (Stack, True)):
        node_fold = kind()
        node_fold.add({"x": torch.tensor([1.5])}, 1, client=1)
        node_fold.add({"x": torch.tensor([0.1])}, 1, client=2)
        fold = kind(None, Codec(), 1.0)
        try:
            fold.take(node_fold.packed(), shapes, [1, 2], [1, 1])
        except FoldError:
            assert refused
        else:
            assert not refused


# Attacks


def test_hostile_clients_follow_from_the_seed() -> None:
    config = parse({"attack.kind": "label-flip", "clients.count": 50})
    hostile = [c for c in range(50) if is_hostile(config, c)]
    assert len(hostile) == 10
    assert hostile == [c for c in range(50) if is_hostile(config, c)]
    other = parse({"attack.kind": "label-flip", "clients.count": 50, "seed": 1})
    assert hostile != [c for c in range(50) if is_hostile(other, c)]
    assert not any(is_hostile(parse({"clients.count": 50}), c) for c in range(50))


def test_attacks_by_hand() -> None:
    all_of_them: Config = {"attack.share": 1.0, "attack.scale": -3.0}
    flip = parse(all_of_them | {"attack.kind": "label-flip"})
    scale = parse(all_of_them | {"attack.kind": "scaled-update"})
    labels = np.array([0, 2, 1], dtype=np.int64)
    examples = Examples(np.arange(3, dtype=np.int32), np.arange(4), labels, pad=0)
    update = {"x": torch.tensor([1.0, -2.0])}
    assert is_flipped(flip, 0)
    assert not is_flipped(scale, 0)
    spoilt = Classification().spoil(examples, ["a", "b", "c"])
    assert spoilt.labels.tolist() == [1, 0, 2]
    assert spoil_update(scale, 0, update)["x"].tolist() == [-3.0, 6.0]
    assert spoil_update(flip, 0, update) is update
    assert labels.tolist() == [0, 2, 1]


# Whole runs


def test_hostile_clients_do_as_they_are_told(config: Config) -> None:
    honest = RecordingGrid(config, nodes=6)
    start(config, honest)
    config = elsewhere(config) | {"attack.kind": "scaled-update", "attack.share": 0.3}
    scaled = RecordingGrid(config, nodes=6)
    start(config, scaled)
    hostile = [c for c in range(6) if is_hostile(parse(config), c)]
    assert len(hostile) == 2
    for one, other in zip(honest.reports[:6], scaled.reports[:6], strict=True):
        assert one.clients == other.clients
        by = -10.0 if one.clients[0] in hostile else 1.0
        torch.testing.assert_close(values(other), by * values(one))
    config = elsewhere(config, **{"attack.kind": "label-flip"})
    flipped = RecordingGrid(config, nodes=6)
    start(config, flipped)
    for one, other in zip(honest.reports[:6], flipped.reports[:6], strict=True):
        same = torch.equal(values(one), values(other))
        assert same == (one.clients[0] not in hostile)


@pytest.mark.parametrize(
    ("method", "robust"),
    [
        ("slora", "median"),
        ("slora", "multi-krum"),
        ("ffa-lora", "trimmed-mean"),
        ("ffa-lora", "krum"),
    ],
)
def test_nodes_and_order_do_not_change_a_robust_result(
    config: Config, method: str, robust: str
) -> None:
    config |= ROBUST | {"server.robust": robust, "method": method}
    config |= {"attack.kind": "scaled-update", "server.clip-norm": 2.0}
    first = final(start(config, RecordingGrid(config, nodes=1)))
    for order, nodes in ((0, 6), (1, 4)):
        config = elsewhere(config)
        directory = start(config, ShufflingGrid(config, nodes, order))
        assert not events(directory, "failure")
        assert not differ(final(directory), first)


@pytest.mark.parametrize("method", ["sft", "lora", "alternate-lora"])
def test_a_hostile_client_moves_a_robust_run_little(
    config: Config, method: str
) -> None:
    """Against the same statistic where the client is honest: a change that is no more.

    The mean goes as far as the hostile update takes it.
    """
    config |= ROBUST | {"method": method, "attack.share": 0.17, "attack.scale": -1e4}
    config |= {"rounds": 2, "run.eval-every": 0}
    moved = {}
    for robust in ("none", "median", "trimmed-mean", "multi-krum"):
        config |= {"server.robust": robust}
        config |= {"server.byzantine": 0 if robust == "none" else 1}
        finals = []
        for kind in ("none", "scaled-update"):
            config = elsewhere(config, **{"attack.kind": kind})
            finals.append(final(start(config, RecordingGrid(config, nodes=2))))
        honest, attacked = finals
        moved[robust] = norm({n: attacked[n] - honest[n] for n in honest})
    assert moved.pop("none") > 100 * max(moved.values())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_honest_clients_keep_to_the_bound(config: Config, dtype: str) -> None:
    config |= {"server.clip-norm": 0.01, "upload.dtype": dtype}
    grid = Grid(config, nodes=6)
    directory = start(config, grid)
    assert not events(directory, "failure")
    if dtype == "float32":
        lengths = [float(values(report).norm()) for report in grid.reports]
        assert lengths == pytest.approx([0.01] * len(lengths), rel=1e-5)
    config = elsewhere(config)
    assert not differ(final(start(config, Grid(config, nodes=2))), final(directory))


def test_a_client_beyond_the_bound_is_named_and_left_out(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config |= {"server.clip-norm": 0.5}
    handler = node.HANDLERS["train"]

    def overstep(message: node.Message, context: Context) -> node.Message:
        reply = handler(message, context)
        if context.node_id == 2:
            report = node.Report.read(reply.content)
            report.update = pack({"x": values(report) * 100})
            reply.content = report.content()
        return reply

    monkeypatch.setitem(node.HANDLERS, "train", overstep)
    directory = start(config, RecordingGrid(config, nodes=6))
    failures = events(directory, "failure")
    assert [(f["round"], f["node"]) for f in failures] == [(1, 2), (2, 2), (3, 2)]
    assert all("server.clip-norm is 0.5" in f["reason"] for f in failures)
