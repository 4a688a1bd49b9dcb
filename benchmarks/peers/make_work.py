"""Write the work of a comparison into a folder: python make_work.py FOLDER.

Reads slora-flwr's flat run config, and the probability of dropout if it is not to be
the model's own, as JSON from standard input. What the folder holds is the same for all
sides: the checkpoint with its head, the first LoRA factors, and every batch.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from numpy.random import Philox
from peft import LoraConfig, get_peft_model

from slora_flwr.backbone.load import find_targets, load_backbone
from slora_flwr.common.random import key
from slora_flwr.config import parse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.data.examples import Examples
from slora_flwr.training.process_data import ProcessData


def make_batches(
    examples: Examples, batch_size: int, rng_key: tuple[int, ...]
) -> list[dict[str, torch.Tensor]]:
    """Return the batches of a client in a round, as slora-flwr draws them."""
    stream = Philox(key=key("train", *rng_key))
    stream.random_raw()  # slora-flwr's seed of dropout
    found = map(examples.batch, examples.shuffled(batch_size, stream))
    return [
        {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels}
        for batch in found
    ]


def make_work(folder: Path, config: dict[str, Any], dropout: float | None) -> None:
    """Write the work of a run config.

    Parameters
    ----------
    folder : Path
        An empty folder.
    config : dict[str, Any]
        slora-flwr's flat run config, of plain LoRA.
    dropout : float or None
        Probability of dropout in the model; None for the checkpoint's own.
    """
    parsed = parse(config)
    data = ProcessData(parsed)
    [phase] = make_schedule(parsed)
    recipe = phase.recipe
    backbone = load_backbone(parsed.model, len(data.classes), parsed.seed)
    model = backbone.model
    if dropout is not None:
        for name in vars(model.config):
            if "dropout" in name:
                setattr(model.config, name, dropout)
    model.save_pretrained(folder / "model")
    backbone.tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(parsed.seed)  # the factors with which slora-flwr begins
    lora = LoraConfig(
        r=parsed.lora.rank,
        lora_alpha=int(parsed.lora.alpha),
        target_modules=list(find_targets(model)),
        modules_to_save=["classifier"],
    )
    get_peft_model(model, lora).save_pretrained(str(folder / "adapter"))
    clients = range(parsed.clients.count)
    parts = [data.examples(client)[0] for client in clients]
    batches = [
        [
            make_batches(
                parts[client], recipe.batch_size, (parsed.seed, number, client)
            )
            for client in clients
        ]
        for number in range(1, parsed.rounds + 1)
    ]
    torch.save(batches, folder / "batches.pt")
    facts = {
        "rounds": parsed.rounds,
        "clients": len(clients),
        "examples": parsed.clients.examples,
        "lr": recipe.lr,
        "precision": parsed.train.precision,
        "config": {**config, "model.name": str(folder / "model")},
    }
    (folder / "work.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    make_work(Path(sys.argv[1]), **json.load(sys.stdin))
