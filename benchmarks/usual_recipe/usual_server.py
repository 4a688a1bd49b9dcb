"""Federated LoRA as in Flower's examples: FedAvg with one client per message."""

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from slora_flwr.backbone.load import find_targets, load_backbone
from slora_flwr.config import RunConfig, parse
from slora_flwr.training.process_data import ProcessData

# Flower ServerApp
app = ServerApp()


def read_recipe(context: Context) -> RunConfig:
    """Return the run config of slora-flwr."""
    return parse(json.loads(Path(str(context.run_config["recipe"])).read_text()))


@cache
def load_data(config: RunConfig) -> ProcessData:
    """Load data and partition once per process, as Flower's examples do."""
    return ProcessData(config)


def make_model(config: RunConfig) -> Any:
    """Load the checkpoint and wrap it with PEFT's LoRA."""
    labels = len(load_data(config).classes)
    model = load_backbone(config.model, labels, config.seed).model
    torch.manual_seed(config.seed)  # the factors with which slora-flwr begins
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=int(config.lora.alpha),
        target_modules=list(find_targets(model)),
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, lora)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg, and record when it began and when each round ended."""
    config = read_recipe(context)
    times: list[float] = []

    def note(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        times.append(time.perf_counter())
        Path(f"{context.run_config['recipe']}.times").write_text(json.dumps(times))
        return MetricRecord({"round": server_round})

    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_available_nodes=config.clients.count,
        min_train_nodes=config.clients.count,
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(make_model(config))),
        num_rounds=config.rounds,
        evaluate_fn=note,
    )
