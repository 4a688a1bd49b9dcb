"""Who trains: the cohort, its nodes, and the nodes that do not fit."""

import hashlib
from collections import Counter
from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_flwr.common.random import sample_cohort
from slora_flwr.runs.events import Event, NodeLeftOut
from slora_flwr.server import collect, fleet
from slora_flwr.server.fleet import Fleet, FleetError
from tests.support.clock import Clock
from tests.support.fleet import EXPECTED, SIZES, FakeGrid, gathered
from tests.support.reference import reference_distinct

GOLDEN = [61, 106, 109, 140, 580]  # of seed 0, round 1


pytestmark = pytest.mark.usefixtures("clock")


def loads(assigned: dict[int, list[int]], nodes: Iterable[int]) -> list[int]:
    return [sum(SIZES[c] for c in assigned.get(node, [])) for node in nodes]


def test_a_seed_and_a_round_always_mean_this_cohort() -> None:
    population = list(range(1000))
    assert sample_cohort(population, 5, 0, 1) == GOLDEN
    text = "str:cohort\x1fint:0\x1fint:1"
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert reference_distinct(int(digest, 16), 5, 1000) == GOLDEN


def test_other_rounds_and_seeds_mean_other_cohorts() -> None:
    population = list(range(1000))
    cohorts = [sample_cohort(population, 5, s, t) for s in range(4) for t in range(4)]
    assert len({tuple(cohort) for cohort in cohorts}) == 16


@settings(max_examples=60)
@given(
    population=st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True),
    count=st.integers(1, 70),
    seed=st.integers(0, 2**63 - 1),
    server_round=st.integers(1, 10_000),
)
def test_a_cohort_is_drawn_without_replacement(
    population: list[int], count: int, seed: int, server_round: int
) -> None:
    population.sort()
    cohort = sample_cohort(population, count, seed, server_round)
    assert cohort == sorted(set(cohort))
    assert set(cohort) <= set(population)
    assert len(cohort) == min(count, len(population))


def test_every_client_is_drawn_about_equally_often() -> None:
    population = list(range(10))
    drawn = Counter(c for t in range(2000) for c in sample_cohort(population, 3, 0, t))
    # 600 each; the standard deviation of a binomial(2000, 0.3) is 20.5.
    assert all(500 < drawn[client] < 700 for client in population)


def test_the_cohort_is_dealt_out_exactly_once() -> None:
    assigned = gathered(FakeGrid([1, 2, 3])).assign([0, 2, 3, 5])
    assert sorted(c for clients in assigned.values() for c in clients) == [0, 2, 3, 5]
    assert set(assigned) <= {1, 2, 3}


def test_the_largest_client_goes_first_to_the_least_loaded_node() -> None:
    # 30 | 20 | then 10 to the 20 and, all loads being 30, 10 to node 1, 5 and 1 to 2.
    assigned = gathered(FakeGrid([1, 2])).assign(range(6))
    assert assigned == {1: [0, 3], 2: [1, 2, 4, 5]}


@settings(max_examples=60)
@given(
    cohort=st.sets(st.sampled_from(sorted(SIZES)), min_size=1),
    nodes=st.integers(1, 5),
)
def test_nodes_differ_by_no_more_than_the_largest_client(
    cohort: set[int], nodes: int
) -> None:
    ids = range(1, nodes + 1)
    assigned = gathered(FakeGrid(ids)).assign(cohort)
    found = loads(assigned, ids)
    assert sum(found) == sum(SIZES[c] for c in cohort)
    assert max(found) - min(found) <= max(SIZES[c] for c in cohort)


@settings(max_examples=60)
@given(data=st.data())
def test_a_client_goes_only_where_it_is_hosted(data: st.DataObject) -> None:
    grid = FakeGrid([1, 2, 3])
    for node in grid.online:
        hosted = data.draw(st.sets(st.sampled_from(sorted(SIZES)), min_size=1))
        grid.hosts[node] = sorted(hosted)
    known = gathered(grid)
    assert known.clients == sorted({c for h in grid.hosts.values() for c in h})
    assigned = known.assign(known.clients)
    dealt = sorted(c for clients in assigned.values() for c in clients)
    assert dealt == known.clients
    for node, clients in assigned.items():
        assert set(clients) <= set(grid.hosts[node])


def plain_rule(
    cohort: Iterable[int], hosted: dict[int, list[int]]
) -> dict[int, list[int]]:
    """Look at every node for every client."""
    loads = dict.fromkeys(sorted(hosted), 0)
    dealt: dict[int, list[int]] = {}
    for client in sorted(cohort, key=lambda c: (-SIZES[c], c)):
        able = [node for node in loads if client in hosted[node]]
        node = min(able, key=lambda n: (loads[n], n))
        loads[node] += SIZES[client]
        dealt.setdefault(node, []).append(client)
    return dealt


@settings(max_examples=100)
@given(data=st.data())
def test_the_assignment_is_that_of_the_plain_rule(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(1, 99), min_size=1, max_size=8, unique=True))
    grid = FakeGrid(ids)
    kinds = st.sampled_from([list(SIZES), [0, 1, 2], [2, 3], [5]])
    for node in ids:
        grid.hosts[node] = data.draw(kinds)
    known = gathered(grid)
    cohort = data.draw(st.sets(st.sampled_from(known.clients)))
    expected = plain_rule(cohort, grid.hosts)
    found = known.assign(cohort)
    assert (found, list(found)) == (expected, list(expected))


class Counted(frozenset[int]):
    """A set that counts how often it is asked for a client."""

    asked = 0

    def __contains__(self, client: object) -> bool:
        Counted.asked += 1
        return super().__contains__(client)


@pytest.mark.parametrize("kinds", [1, 3])
def test_an_assignment_does_not_ask_every_node_about_every_client(
    kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "frozenset", Counted, raising=False)
    grid = FakeGrid(range(1, 201))
    everyone = list(SIZES)
    grid.hosts = {n: everyone[: len(everyone) - n % kinds] for n in grid.online}
    known = gathered(grid)
    Counted.asked = 0
    known.assign(SIZES)
    assert Counted.asked <= len(grid.online) + len(SIZES) * kinds


def test_clients_hosted_everywhere_fill_up_the_less_loaded_node() -> None:
    grid = FakeGrid([1, 2])
    grid.hosts = {1: [0, 1, 2, 3], 2: [1, 2, 3]}
    # 0 (30) must go to node 1; 1 (20), 2 (10) then balance on node 2, 3 (10) on node 1.
    assert gathered(grid).assign([0, 1, 2, 3]) == {1: [0, 3], 2: [1, 2]}


@pytest.mark.parametrize(
    ("attribute", "given", "reason"),
    [
        ("protocol", 6, "protocol is 6, the server's is 7; upgrade the node"),
        ("protocol", 8, "protocol is 8, the server's is 7; upgrade the server"),
        ("backbone", "bad", "backbone is 'bad', the server's is 'b0ne'"),
        ("partition", "bad", "partition is 'bad', the server's is 'pa27'"),
    ],
)
def test_a_node_of_another_kind_is_left_out_and_named(
    attribute: str, given: object, reason: str
) -> None:
    grid = FakeGrid([1, 2, 3])
    getattr(grid, attribute)[2] = given
    known = gathered(grid)
    assert known.left_out == {2: reason}
    assert set(known.assign(SIZES)) == {1, 3}


def test_all_that_differs_is_named() -> None:
    grid = FakeGrid([1, 2])
    grid.protocol[2], grid.partition[2] = 6, "bad"
    reason = gathered(grid).left_out[2]
    assert reason == (
        "protocol is 6, the server's is 7; "
        "partition is 'bad', the server's is 'pa27'; upgrade the node"
    )


def test_a_node_that_fails_is_left_out_with_its_reason() -> None:
    grid = FakeGrid([1, 2])
    grid.broken[2] = lambda message: Message(Error(0, "no disk"), reply_to=message)
    assert gathered(grid).left_out == {2: "it cannot describe itself: no disk"}


@pytest.mark.parametrize("record", ["config", "metrics"])
def test_a_node_that_answers_without_a_record_is_left_out(record: str) -> None:
    grid = FakeGrid([1, 2])

    def answer(message: Message) -> Message:
        other = {"config": MetricRecord({"x": 1}), "metrics": ConfigRecord({"x": 1})}
        return Message(RecordDict({record: other[record]}), reply_to=message)  # type: ignore[dict-item]

    grid.broken[2] = answer
    known = gathered(grid)
    assert set(known.left_out) == {2}
    assert set(known.assign(SIZES)) == {1}


def test_no_fitting_node_is_an_error_with_the_reasons() -> None:
    grid = FakeGrid([1, 2])
    grid.protocol = {1: 6, 2: 8}
    wanted = r"node 1: protocol is 6.*node 2: protocol is 8"
    with pytest.raises(FleetError, match=wanted):
        gathered(grid)


def test_nodes_that_do_not_answer_are_an_error() -> None:
    grid = FakeGrid([1])
    grid.silent = {1}
    with pytest.raises(FleetError, match="no node can train"):
        gathered(grid)


def test_too_few_nodes_are_an_error(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(fleet, "REGISTRATION_SECONDS", 7.0)
    with pytest.raises(FleetError, match=r"2 nodes .* 7 seconds; .*min-nodes is 3"):
        gathered(FakeGrid([1, 2]), min_nodes=3)
    assert 7.0 <= clock.now < 8.0


class LateGrid(FakeGrid):
    """A node more each second."""

    def __init__(self, clock: Clock, nodes: int) -> None:
        super().__init__()
        self._clock, self._nodes = clock, nodes

    def get_node_ids(self) -> Iterable[int]:
        return range(1, min(self._nodes, int(self._clock.now)) + 1)


def test_it_waits_for_the_nodes_it_needs(clock: Clock) -> None:
    known = gathered(LateGrid(clock, nodes=8), min_nodes=3)
    assert set(known.assign(SIZES)) == {1, 2, 3}


def test_it_waits_for_the_nodes_that_a_simulation_tells_of(clock: Clock) -> None:
    grid = LateGrid(clock, nodes=8)
    grid.of_nodes = 5
    assert set(gathered(grid).assign(SIZES)) == {1, 2, 3, 4, 5}


def test_it_goes_on_without_nodes_that_never_come(clock: Clock) -> None:
    grid = FakeGrid([1, 2])
    grid.of_nodes = 3
    assert set(gathered(grid).assign(SIZES)) == {1, 2}
    assert clock.now == pytest.approx(fleet.REGISTRATION_SECONDS, abs=1.0)


def test_nodes_that_come_later_are_used_after_a_refresh() -> None:
    grid = FakeGrid([1])
    known = gathered(grid)
    grid.online = [1, 2]
    assert set(known.assign(SIZES)) == {1}
    known.refresh(grid)
    assert set(known.assign(SIZES)) == {1, 2}


def test_nodes_that_went_are_not_used_and_not_asked_again() -> None:
    grid = FakeGrid([1, 2])
    grid.hosts = {1: [0, 1], 2: [2, 3]}
    known = gathered(grid)
    grid.online = [2]
    known.refresh(grid)
    assert known.clients == [2, 3]
    grid.online = [1, 2]
    known.refresh(grid)
    assert known.clients == [0, 1, 2, 3]
    assert sorted(grid.asked) == [1, 2]


def test_a_node_that_was_left_out_is_not_asked_again() -> None:
    grid = FakeGrid([1, 2])
    grid.protocol[2] = 6
    known = gathered(grid)
    known.refresh(grid)
    assert sorted(grid.asked) == [1, 2]


def test_a_node_that_never_answers_costs_one_deadline(clock: Clock) -> None:
    grid = FakeGrid([1, 2])
    grid.silent = {2}
    known = gathered(grid)
    assert clock.now == pytest.approx(5.0, abs=0.5)
    known.refresh(grid)
    assert clock.now == pytest.approx(5.0, abs=0.5)


def test_a_node_that_answers_late_takes_part_from_then_on() -> None:
    grid = FakeGrid([1, 2])
    grid.silent = {2}
    known = gathered(grid)
    assert known.left_out == {2: "it did not describe itself before the deadline"}
    grid.silent = set()
    known.refresh(grid)
    assert known.left_out == {}
    assert set(known.assign(SIZES)) == {1, 2}
    assert sorted(grid.asked) == [1, 2]


def test_a_forgotten_node_takes_part_once_it_has_answered_again() -> None:
    grid = FakeGrid([1, 2])
    known = gathered(grid)
    known.forget(2)
    assert set(known.assign(SIZES)) == {1}
    grid.silent = {2}
    known.refresh(grid)
    known.refresh(grid)
    assert set(known.assign(SIZES)) == {1}
    assert sorted(grid.asked) == [1, 2, 2]
    grid.silent = set()
    known.refresh(grid)
    assert set(known.assign(SIZES)) == {1, 2}


def test_it_waits_for_as_many_clients_as_a_round_needs(clock: Clock) -> None:
    class RestartingGrid(FakeGrid):
        def get_node_ids(self) -> Iterable[int]:
            return [1] if clock.now < 1 else ([] if clock.now < 3 else [2])

    grid = RestartingGrid()
    known = gathered(grid)
    clock.sleep(1)
    known.refresh(grid)
    assert known.clients == []
    known.refresh(grid, wanted=4)
    assert clock.now == pytest.approx(3.0, abs=0.25)
    assert set(known.assign(SIZES)) == {2}
    clock.sleep(1)
    grid.silent = {2}
    known.forget(2)
    known.refresh(grid, wanted=4)
    assert clock.now == pytest.approx(4.0 + 5.0, abs=0.5)
    assert known.clients == []


def test_a_node_for_which_the_superlink_answers_is_asked_again() -> None:
    grid = FakeGrid([1, 2])
    grid.broken[2] = lambda message: Message(Error(5, "gone"), reply_to=message)
    known = gathered(grid)
    assert known.left_out == {}
    assert set(known.assign(SIZES)) == {1}
    del grid.broken[2]
    known.refresh(grid)
    assert set(known.assign(SIZES)) == {1, 2}


def test_a_population_of_none_has_an_empty_cohort() -> None:
    assert sample_cohort([], 5, 0, 1) == []


def test_no_clients_need_no_nodes() -> None:
    grid = FakeGrid([1])
    known = gathered(grid)
    grid.online = []
    known.refresh(grid)
    assert known.assign([]) == {}


def test_replies_that_are_there_at_the_deadline_count(clock: Clock) -> None:
    class SlowGrid(FakeGrid):
        def _answer(self, message: Message) -> Message:
            clock.sleep(60.0)
            return super()._answer(message)

    grid = SlowGrid([1])
    query = Message(RecordDict(), dst_node_id=1, message_type="query")
    replies = list(collect.collect(grid, [query], deadline=5.0))
    assert [reply.metadata.src_node_id for reply, _ in replies] == [1]


def test_a_reply_is_given_once_and_waiting_ends_at_the_deadline(clock: Clock) -> None:
    grid = FakeGrid([1, 2, 3])
    grid.silent = {2}
    queries = [
        Message(RecordDict(), dst_node_id=node, message_type="query")
        for node in grid.online
    ]
    replies = list(collect.collect(grid, queries, deadline=5.0))
    assert sorted(reply.metadata.src_node_id for reply, _ in replies) == [1, 3]
    assert clock.now == pytest.approx(5.0, abs=0.25)


def test_a_registered_name_stands_in_log_and_events() -> None:
    """Also of a node that does not say who it is."""
    grid = FakeGrid([1, 2, 3])
    grid.registered = {1: "st-mary", 3: "\x1b[2J\n" + "x" * 300}
    grid.protocol = {1: 6, 2: 6}
    told: list[Event] = []
    found = Fleet(EXPECTED, 3, deadline=5.0)
    found.gather(grid, told.append)
    left_out = [event.name for event in told if isinstance(event, NodeLeftOut)]
    assert left_out == ["st-mary (node 1)", "node 2"]
    shown = r"\x1b[2J\n" + "x" * (200 - 5)
    assert found.name(3) == f"{shown}… (305 characters) (node 3)"


class CrowdedGrid(FakeGrid):
    """What counts the messages that have no reply yet."""

    most = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        taken = super().push_messages(messages)
        self.most = max(self.most, len(self._sent))
        return taken


@pytest.mark.parametrize(
    ("simulation", "most"), [(CrowdedGrid, 2), (collect.InMemoryGrid, 7)]
)
def test_a_simulation_is_sent_a_few_messages_at_a_time(
    monkeypatch: pytest.MonkeyPatch, simulation: type, most: int
) -> None:
    monkeypatch.setattr(collect, "InMemoryGrid", simulation)
    monkeypatch.setattr(collect, "SIMULATED", 2)
    grid = CrowdedGrid(range(1, 8))
    assert set(gathered(grid)._online) == set(grid.online)
    assert grid.most == most
    queries = [
        Message(RecordDict(), dst_node_id=node, message_type="query")
        for node in grid.online
    ]
    grid.most = 0
    replies = list(collect.collect(grid, queries, deadline=5.0))
    assert [reply.metadata.src_node_id for reply, _ in replies] == grid.online
    assert grid.most == most


def test_a_message_that_no_node_takes_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Picky(FakeGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            kept = [m for m in messages if m.metadata.dst_node_id > 3]
            return super().push_messages(kept)

    monkeypatch.setattr(collect, "InMemoryGrid", Picky)
    monkeypatch.setattr(collect, "SIMULATED", 2)
    grid = Picky(range(1, 6))
    queries = [
        Message(RecordDict(), dst_node_id=node, message_type="query")
        for node in grid.online
    ]
    replies = list(collect.collect(grid, queries, deadline=5.0))
    assert [reply.metadata.src_node_id for reply, _ in replies] == [4, 5]


def test_nodes_not_asked_before_the_deadline_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collect, "InMemoryGrid", FakeGrid)
    monkeypatch.setattr(collect, "SIMULATED", 2)
    grid = FakeGrid([1, 2, 3, 4])
    grid.silent = {2, 3}
    known = gathered(grid)
    assert known.left_out.keys() == {2, 3, 4}
