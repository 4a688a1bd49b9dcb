"""Why bindings of the conformance suite differ: with the cause removed, they agree."""

import copy
import importlib
from typing import Any

import numpy as np
import pytest

from fedlora_conformance import run

CASES = run.load()


def test_chorus_fl_differs_by_the_scaling_of_its_residual() -> None:
    pytest.importorskip("chorus.server.aggregation")
    import torch
    from chorus.server.weight_manager import fold_residuals_into_base

    from bindings import chorus_fl

    for name, case in CASES.items():
        if case["aggregator"] != "exact" or len(case["rounds"]) > 1:
            continue
        s = case["scaling"]["s"]

        def scaled(base: Any, residuals: Any, s: float = s) -> Any:
            larger = {name: s * value for name, value in residuals.items()}
            return fold_residuals_into_base(base, larger)

        answer = chorus_fl.aggregate(case, scaled)
        assert all(part.passes for part in run.check(case, answer)), name
    # By hand: clients of 3 and 1 examples return diag(1, 0) and diag(0, 1). Their mean
    # is diag(3/4, 1/4), its best approximation of rank 1 diag(3/4, 0), and s is 2.
    rows = np.eye(2)
    clients = [
        {
            "layers": {"w": {"A": row[None], "B": row[:, None]}},
            "head": rows,
            "examples": n,
        }
        for row, n in zip(rows, (3, 1), strict=True)
    ]
    start = {"layers": {"w": {"W": np.zeros((2, 2))}}}
    case = {
        "aggregator": "exact",
        "scaling": {"s": 2.0, "rank": 1},
        "start": start,
        "rounds": [{"clients": clients}],
    }
    [found] = chorus_fl.aggregate(case)
    torch.testing.assert_close(
        found["effective"]["w"], torch.diag(torch.tensor([1.5, 0.25])).double()
    )


def test_fed_sb_differs_by_its_weights_alone() -> None:
    fed_sb = importlib.import_module("bindings.fed_sb")
    reference = importlib.import_module(
        "tests.aggregation.test_conformance"
    ).Reference()
    for name, case in CASES.items():
        equal = copy.deepcopy(case)
        for current in equal["rounds"]:
            for client in current["clients"]:
                client["examples"] = 1
        try:
            answer = fed_sb.aggregate(equal)
        except NotImplementedError:
            continue
        for given, right in zip(answer, reference(equal), strict=True):
            for layer, weight in right["effective"].items():
                np.testing.assert_allclose(
                    given["effective"][layer],
                    weight,
                    rtol=1e-5,
                    atol=1e-5,
                    err_msg=name,
                )
            np.testing.assert_allclose(given["head"], right["head"], rtol=1e-5)
