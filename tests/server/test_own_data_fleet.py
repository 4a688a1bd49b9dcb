"""What the server learns of nodes that have data of their own."""

from typing import Any

import pytest
from flwr.proto.node_pb2 import NodeInfo

from slora_flwr.server.fleet import FleetError
from tests.support.clock import Clock
from tests.support.own_data import HospitalGrid, count_alone, gathered, hospital


def test_labels_are_the_union_and_nodes_are_numbered_by_name(clock: Clock) -> None:
    grid = HospitalGrid(
        {
            7: hospital("b", flu=3, ok=1),
            8: hospital("a", ok=5),
            9: hospital("c", burn=2),
        }
    )
    found = gathered(grid, also=["rash"])
    assert found.classes == ["burn", "flu", "ok", "rash"]
    assert found.sizes == {0: 5, 1: 4, 2: 2}
    assert found.assign([0, 1, 2]) == {8: [0], 7: [1], 9: [2]}
    assert found.name(8) == "a (node 8)"


def test_given_labels_change_nothing_about_the_numbers(clock: Clock) -> None:
    grid = HospitalGrid({n: hospital(f"{9 - n}", x=n, z=1) for n in range(1, 9)})
    found = gathered(grid, labels=["x", "y"])
    assert found.classes == ["x", "y"]
    assert found.assign(range(8)) == {n: [8 - n] for n in range(1, 9)}


def test_a_nodes_own_number_is_kept(clock: Clock) -> None:
    one = hospital("a", x=1, y=2) | {"client": 5}
    found = gathered(HospitalGrid({7: one, 8: hospital("b", x=4)}))
    assert found.assign([0, 5]) == {7: [5], 8: [0]}


def test_a_node_without_a_name_is_called_by_its_number(clock: Clock) -> None:
    one = hospital("node 0", x=1, y=2) | {"client": 0}
    other = hospital("node 1", x=1) | {"client": 0}
    same = hospital("node 0", x=1) | {"client": 0}
    grid = HospitalGrid({7: one, 8: other, 9: same, 10: hospital("node 10", y=1)})
    found = gathered(grid)
    assert found.name(7) == "node 0"
    assert found.name(8) == "node 1 (node 8)"  # whose number is another
    assert found.name(9) == "node 0 (id 9)"  # who does not have it
    assert found.name(10) == "node 10"  # its id
    assert found.left_out[9] == "the name node 0 is that of node 0"


def test_numbers_of_their_own_go_first(clock: Clock) -> None:
    told = hospital("b", x=1) | {"client": 0}
    found = gathered(HospitalGrid({7: hospital("a", x=3, y=1), 8: told}))
    assert found.assign([0, 1]) == {8: [0], 7: [1]}


def test_it_waits_for_all_nodes_of_a_simulation(clock: Clock) -> None:
    grid = HospitalGrid({7: hospital("a", x=3), 8: hospital("b", y=1)})
    grid.of_nodes = 2
    all_nodes = dict(grid.since)

    def since() -> dict[int, str]:
        return all_nodes if clock.now > 1 else {7: "Monday"}

    grid.get_nodes = lambda: [  # type: ignore[method-assign]
        NodeInfo(node_id=n, last_activated_at=at) for n, at in since().items()
    ]
    assert gathered(grid).classes == ["x", "y"]


def test_labels_of_a_node_that_is_left_out_do_not_count(clock: Clock) -> None:
    other = hospital("a", z=1) | {"protocol": 6}
    found = gathered(HospitalGrid({7: other, 8: hospital("b", x=1, y=1)}))
    assert found.classes == ["x", "y"]
    assert set(found.left_out) == {7}


def test_a_node_that_comes_later_takes_part_without_its_new_labels(
    clock: Clock,
) -> None:
    grid = HospitalGrid({7: hospital("a", x=3, y=1)})
    found = gathered(grid)
    grid.nodes |= {8: hospital("b", x=2, new=40), 9: hospital("c", new=9)}
    grid.since |= {8: "Tuesday", 9: "Tuesday"}
    found.refresh(grid)
    assert found.classes == ["x", "y"]
    assert found.sizes == {0: 4, 1: 2}
    assert found.left_out == {
        9: "it has 0 usable examples, clients.min-examples is 1; rows skipped: "
        "9 unknown label"
    }


def test_a_restarted_node_is_asked_again_and_stays_the_same_client(
    clock: Clock,
) -> None:
    grid = HospitalGrid({7: hospital("a", x=3, y=1), 8: hospital("b", x=1)})
    found = gathered(grid)
    # With node authentication it has its id again; without, another.
    grid.nodes |= {7: hospital("a", x=30), 9: hospital("b", x=2)}
    grid.since = {7: "Tuesday", 9: "Tuesday"}
    found.refresh(grid)
    assert found.sizes == {0: 30, 1: 2}
    assert found.assign([0, 1]) == {7: [0], 9: [1]}
    assert grid.asked == [7, 8, 7, 9]
    found.refresh(grid)
    assert grid.asked == [7, 8, 7, 9]


def test_two_nodes_cannot_be_one_client(clock: Clock) -> None:
    grid = HospitalGrid(
        {
            7: hospital("a", x=3, y=1) | {"client": 2},
            8: hospital("b", x=1) | {"client": 2},
        }
    )
    found = gathered(grid)
    assert found.left_out == {8: "client 2 is that of a (node 7)"}
    assert found.assign([2]) == {7: [2]}


def test_a_node_with_too_few_usable_rows_is_left_out_by_name(clock: Clock) -> None:
    few = hospital("few", x=2) | {"skipped": {"broken": 7}}
    found = gathered(HospitalGrid({7: few, 8: hospital("b", x=9, y=9)}), min_examples=3)
    assert found.left_out == {
        7: "it has 2 usable examples, clients.min-examples is 3; rows skipped: 7 broken"
    }


def test_one_label_is_no_task(clock: Clock) -> None:
    with pytest.raises(FleetError, match=r"labels are \['x'\]; at least two"):
        gathered(HospitalGrid({7: hospital("a", x=3)}))


def test_no_fitting_node_is_an_error_with_the_reasons(clock: Clock) -> None:
    grid = HospitalGrid({7: hospital("a", x=1, y=1) | {"protocol": 6}})
    with pytest.raises(
        FleetError, match=r"no node can train \(node 7: protocol is 6, t"
    ):
        gathered(grid)


@pytest.mark.parametrize(
    "labels", [{"x": -1, "y": 2}, {"x": 1.5, "y": 2.5}, {"": 1, "y": 2}]
)
def test_a_description_that_cannot_be_true_is_left_out(
    clock: Clock, labels: dict[str, Any]
) -> None:
    bad = {"name": "bad", "labels": labels}
    found = gathered(HospitalGrid({7: bad, 8: hospital("b", x=1, y=1)}))
    assert found.left_out[7].startswith("its description is off")
    assert found.classes == ["x", "y"]


def test_without_classes_nodes_tell_counts_alone(clock: Clock) -> None:
    grid = HospitalGrid({7: count_alone("b", 4), 8: count_alone("a", 5)})
    found = gathered(grid, has_classes=False)
    assert found.classes == []
    assert found.sizes == {0: 5, 1: 4}
    assert found.agreed()["classes"] == []


def test_without_classes_who_tells_labels_is_left_out(clock: Clock) -> None:
    nodes = {7: hospital("a", flu=3), 8: count_alone("b", 4), 9: count_alone("c", -1)}
    found = gathered(HospitalGrid(nodes), has_classes=False)
    assert found.sizes == {0: 4}
    assert "it tells labels, which the task has none of" in found.left_out[7]
    assert "its description is off" in found.left_out[9]


def test_without_classes_small_nodes_are_left_out(clock: Clock) -> None:
    grid = HospitalGrid({7: count_alone("b", 4), 8: count_alone("a", 5)})
    found = gathered(grid, has_classes=False, min_examples=5)
    assert found.sizes == {0: 5}
    assert "it has 4 usable examples, clients.min-examples is 5" in found.left_out[7]
