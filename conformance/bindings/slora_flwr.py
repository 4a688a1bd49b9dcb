"""slora-flwr's aggregators, with what they import."""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "flwr==1.42.0", "pydantic", "pyarrow", "safetensors", "scipy",
# ]
#
# [tool.fedlora-conformance]
# package = "slora-flwr"
# source = "https://github.com/slora-flwr/slora-flwr"
# binds = "Mean, Stack, ServerOptimizer, residual and redistribute"
# without-dependencies = ["../.."]
# ///

from typing import Any

import torch

from fedlora_conformance import Answer, Case
from slora_flwr.adapters.low_rank import cut_ranks
from slora_flwr.aggregation.lora_products import redistribute, residual
from slora_flwr.aggregation.mean import Mean
from slora_flwr.aggregation.server_optimizer import ServerOptimizer
from slora_flwr.aggregation.stack import Stack
from slora_flwr.common.tensors import State

HEAD = "head"


def aggregate(case: Case) -> Answer:
    """Return the answer to a case, computed by this project's aggregators."""
    scaling, aggregator = case["scaling"]["s"], case["aggregator"]
    start = case["start"]["layers"]
    base = {name: torch.tensor(layer["W"]) for name, layer in start.items()}
    state = read_state({"layers": start, "head": case["start"]["head"]}, 0)
    frozen: State = {}
    if aggregator == "ffa":
        frozen = {n: state.pop(n) for n in list(state) if n.endswith(".lora_A")}
    optimizer = ServerOptimizer("none", 1.0)
    answers = []
    for current in case["rounds"]:
        clients = current["clients"]
        ranks = {i: client["rank"] for i, client in enumerate(clients)}
        kind = Stack if aggregator in ("exact", "flexlora") else Mean
        fold = kind(ranks.__getitem__)
        for i, client in enumerate(clients):
            sent = cut_ranks(state, ranks[i])
            after = read_state(client, case["scaling"]["rank"])
            trained = {n for n in sent if n == HEAD or n[-1] in current["trains"]}
            update = {
                name: after[name] - sent[name] for name in sent if name in trained
            }
            fold.add(update, client["examples"], i)
        before, state = state, optimizer.step(state, fold.result())
        if isinstance(fold, Stack) and aggregator == "flexlora":
            state |= redistribute(fold, before)
        if isinstance(fold, Stack) and aggregator == "exact":
            change = residual(fold, before, state, scaling)
            for name in base:
                base[name] = base[name] + (change[f"{name}.b"] @ change[f"{name}.a"])
        answers.append(
            {
                "effective": {
                    name: (weight + scaling * product(state | frozen, name)).numpy()
                    for name, weight in base.items()
                },
                "head": state[HEAD].numpy(),
            }
        )
    return answers


def read_state(result: dict[str, Any], rank: int) -> State:
    """Return factors and head, float32, padded with zeros to a rank."""
    state = {}
    for name, layer in result["layers"].items():
        a, b = (torch.tensor(layer[factor]).float() for factor in "AB")
        missing = max(0, rank - len(a))
        state[f"{name}.lora_A"] = torch.cat([a, torch.zeros(missing, a.shape[1])])
        state[f"{name}.lora_B"] = torch.cat([b, torch.zeros(len(b), missing)], dim=1)
    state[HEAD] = torch.tensor(result["head"]).float()
    return state


def product(state: State, name: str) -> torch.Tensor:
    """Return B·A of a layer in float64, so that only the factors are rounded."""
    return state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
