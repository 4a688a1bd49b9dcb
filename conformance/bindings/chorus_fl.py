"""chorus-fl: its strategies `FedAvg` and `FedExLoRA`, weighted by data set sizes.

`exact` is what a server with base weights does after each round: it aggregates by
`FedExLoRA` and folds the residual into the base weights. `flexlora` is the same without
base weights, where the residual is kept aside. The adapter that comes out is loaded by
the client with the scaling it trains with.

Cases of `exact` with several rounds are not offered: in their later rounds, clients
return what they made of the means of A and B, but chorus-fl splits the same sum
otherwise, and would have sent them the SVD's factors.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "chorus-fl==0.1.0"]
#
# [tool.fedlora-conformance]
# package = "chorus-fl"
# source = "https://pypi.org/project/chorus-fl/"
# binds = "strategies FedAvg and FedExLoRA, and fold_residuals_into_base"
# differs = """\
# The residual is added to the base weight as it is. An adapter that is used with \
# alpha / r other than 1 needs the residual times alpha / r: with that factor, all \
# cases pass."""
# ///

from collections.abc import Callable

import torch
from chorus.server.aggregation import FedAvg, FedExLoRA
from chorus.server.weight_manager import fold_residuals_into_base
from torch import Tensor

from fedlora_conformance import Answer, Case


def aggregate(case: Case, fold: Callable = fold_residuals_into_base) -> Answer:
    """Return chorus-fl's answer to a case."""
    aggregator, s = case["aggregator"], case["scaling"]["s"]
    if aggregator not in ("fedavg", "exact", "flexlora"):
        raise NotImplementedError
    if aggregator == "exact" and len(case["rounds"]) > 1:
        raise NotImplementedError
    layers = case["start"]["layers"]
    base = {f"{name}.weight": tensor(layer["W"]) for name, layer in layers.items()}
    answers = []
    for current in case["rounds"]:
        exact = FedExLoRA(output_rank=case["scaling"]["rank"])
        strategy = FedAvg() if aggregator == "fedavg" else exact
        clients = current["clients"]
        adapter = strategy.aggregate(
            [adapter_of(client) for client in clients],
            [client["examples"] for client in clients],
        )
        if aggregator == "exact":
            base = fold(base, exact.get_residuals())
        effective = {
            name: base[f"{name}.weight"].double()
            + s
            * adapter[f"{name}.lora_B.weight"].double()
            @ adapter[f"{name}.lora_A.weight"].double()
            for name in layers
        }
        answers.append({"effective": effective, "head": adapter["head.weight"]})
    return answers


def adapter_of(client: dict) -> dict[str, Tensor]:
    """Return a client's factors and head by PEFT's names."""
    adapter = {
        f"{name}.lora_{factor}.weight": tensor(layer[factor])
        for name, layer in client["layers"].items()
        for factor in "AB"
    }
    return adapter | {"head.weight": tensor(client["head"])}


def tensor(value: object) -> Tensor:
    """Return a float32 tensor."""
    return torch.tensor(value, dtype=torch.float32)
