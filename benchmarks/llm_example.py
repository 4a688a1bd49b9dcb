"""Compare rounds of a language model with those of Flower's example of such.

- `slora-flwr`: the inline engine. Its model is loaded once, and one message to a node
  has all of its clients.
- `example's way`: what the ClientApp of Flower's LLM example does in each call. It
  loads model and tokenizer with transformers, wraps the model with PEFT, trains with
  transformers' Trainer, and sends an array per tensor. A client has a message of its
  own, and the server is FedAvg.

Both train the same clients on the same batches, from the same factors of LoRA; the
losses tell whether they did. Without `--model`, the model is a random Llama of 20
million weights. Each way has a process of its own, one at a time, in turns.

`clients a minute` and `CPU s a client` are of the time from the first message with a
state until the last reply, and `start` is what comes before. `peak` is the process's
largest resident memory. In the example's way server and clients share a process here,
but the server drops its model before the first client, and each client's is collected
as it ends: memory that the example may hold longer does not count.
"""

import argparse
import csv
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from step_memory import SMALL, save_model, status

WAYS = ("slora-flwr", "example's way")
LOSSES = ("training loss", "test loss")
UNITS = {
    "clients a minute": (1, ".2f"),
    "CPU s a client": (1, ".2f"),
    "start": (1, ".1f"),
    "peak": (1e6, ",.0f"),
    "payload": (1e6, ",.2f"),
    "messages": (1e6, ",.2f"),
    "training loss": (1, ".6f"),
    "test loss": (1, ".6f"),
}


def save_dialogues(path: Path, length: int, count: int, seed: int) -> None:
    """Save prompts and responses that together fill the length with any tokenizer."""
    words = random.Random(seed)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "response"])
        for _ in range(count):
            said = [f"w{words.randrange(3, 1000)}" for _ in range(length)]
            half = words.randrange(length // 4, length // 2)
            rows.writerow([" ".join(said[:half]), " ".join(said[half:])])


def run_config(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the run config of both ways."""
    return {
        "task": "causal-lm",
        "method": "lora",
        "rounds": options.rounds,
        "model.name": options.model,
        "data.name": str(folder.parent / "data"),
        "data.test": "test",
        "data.text": "prompt",
        "data.response": "response",
        "data.template": "plain",
        "data.max-length": options.length,
        "clients.by": "prompt",
        "clients.partitioner": "iid",
        "clients.count": options.clients,
        "clients.per-round": options.clients,
        "train.batch-size": options.batch,
        "lora.rank": options.rank,
        "server.average": "none",
        "run.eval-every": 0,
        "run.dir": str(folder / "run"),
    }


class Clock:
    """Seconds, of the wall and of the processor, between a start and the last end."""

    def __init__(self) -> None:
        self.before = time.perf_counter()
        self.start: tuple[float, float] | None = None

    def begin(self) -> None:
        """Note the start, the first time."""
        if self.start is None:
            self.start = self._now()

    def end(self) -> None:
        """Note the end."""
        self.last, self.peak = self._now(), status("VmHWM")

    def figures(self, clients: int) -> dict[str, float]:
        """Return what is told of a number of clients."""
        assert self.start is not None
        seconds, cpu = (b - a for a, b in zip(self.start, self.last, strict=True))
        return {
            "clients a minute": 60 * clients / seconds,
            "CPU s a client": cpu / clients,
            "start": self.start[0] - self.before,
            "peak": self.peak,
        }

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def ours(config: dict[str, Any], clock: Clock) -> dict[str, float]:
    """Make a run over the inline engine."""
    from flwr.app import Message, MessageType

    from slora_flwr.engines.inline import InlineGrid
    from slora_flwr.runs.reader import read_run
    from slora_flwr.server.run import run

    class TimedGrid(InlineGrid):
        """Notes when clients begin and end."""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            """Store messages; see `InlineGrid`."""
            given = list(messages)
            if any(m.metadata.message_type == MessageType.TRAIN for m in given):
                clock.begin()
            return super().push_messages(given)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            """Yield replies; see `InlineGrid`."""
            for reply in super().pull_messages(message_ids):
                if reply.metadata.message_type == MessageType.TRAIN:
                    clock.end()
                yield reply

    grid = TimedGrid(config)
    summary = run(grid, config, grid.run.run_id, share=grid.share)
    made = read_run(Path(config["run.dir"]))
    [*_, last] = made.rounds
    found = {
        name: sum(made.total(unit, way) or 0 for way in ("up", "down"))
        for name, unit in (("payload", "payload"), ("messages", "message"))
    }
    losses = {"training loss": last.train_loss, "test loss": summary["loss"]}
    return clock.figures(sum(done.replied for done in made.rounds)) | found | losses


def theirs(config: dict[str, Any], clock: Clock) -> dict[str, float]:
    """Hold the rounds as Flower's LLM example does."""
    import torch
    from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
    from flwr.supercore.task_identity import TaskIdentity
    from numpy.random import Philox
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from torch.nn.functional import cross_entropy
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
    )

    from slora_flwr.backbone.load import find_targets
    from slora_flwr.common.random import key
    from slora_flwr.config import parse
    from slora_flwr.config.schedule import make_schedule
    from slora_flwr.data.examples import Batch, Examples
    from slora_flwr.training.process_data import ProcessData

    parsed = parse(config)
    # In the process, as the example's data sets are.
    data = ProcessData(parsed)
    parts = [data.examples(client)[0] for client in range(parsed.clients.count)]
    test = data.tokenised.test
    [phase] = make_schedule(parsed)
    recipe = phase.recipe
    # Flower's launcher sets these, which messages carry.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
    sizes = {"payload": 0, "messages": 0}

    def make_model() -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            parsed.model.name, dtype=torch.float32
        )
        torch.manual_seed(parsed.seed)  # the factors with which slora-flwr begins
        lora = LoraConfig(
            r=parsed.lora.rank,
            lora_alpha=int(parsed.lora.alpha),
            target_modules=list(find_targets(model)),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora)

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            labels[:, 1:].flatten(),
            reduction="sum",
        )

    def feed(batch: Batch) -> dict[str, torch.Tensor]:
        return {
            "input_ids": batch.ids,
            "attention_mask": batch.mask,
            "labels": batch.labels,
        }

    def batches_of(examples: Examples, client: int, number: int) -> Iterator[Batch]:
        stream = Philox(key=key("train", parsed.seed, number, client))
        stream.random_raw()  # slora-flwr's seed of dropout
        for _ in range(recipe.epochs):
            for rows in examples.shuffled(recipe.batch_size, stream):
                yield examples.batch(rows)

    def send(message: Message) -> Message:
        proto = message_to_proto(message)
        sizes["messages"] += proto.ByteSize()
        state = message.content.array_records["arrays"]
        sizes["payload"] += sum(t.nbytes for t in state.to_torch_state_dict().values())
        return message_from_proto(proto)

    def train(message: Message, client: int, number: int) -> Message:
        model = make_model()
        tokenizer = AutoTokenizer.from_pretrained(parsed.model.name)
        state = message.content.array_records["arrays"].to_torch_state_dict()
        set_peft_model_state_dict(model, state)
        examples = parts[client]
        batches = list(batches_of(examples, client, number))
        # All tokens weigh the same, as slora-flwr has it.
        size = int(examples.units.sum()) * recipe.epochs / len(batches)
        trainer = OrderedTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(Path(config["run.dir"]) / "trainer"),
                max_steps=len(batches),
                learning_rate=recipe.lr,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                weight_decay=recipe.weight_decay,
                max_grad_norm=recipe.clip_norm,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            processing_class=tokenizer,
            train_dataset=[feed(batch) for batch in batches],
            compute_loss_func=lambda outputs, labels, **_: (
                loss_of(outputs.logits, labels) / size
            ),
        )
        loss = trainer.train().training_loss
        content = RecordDict(
            {
                "arrays": ArrayRecord(get_peft_model_state_dict(model)),
                "metrics": MetricRecord({"num-examples": len(examples), "loss": loss}),
            }
        )
        return Message(content, reply_to=message)

    class OrderedTrainer(Trainer):
        """Trains on batches as they are."""

        def get_train_dataloader(self) -> Any:
            """Return the batches, in order."""
            given: Any = self.train_dataset
            return torch.utils.data.DataLoader(given, batch_size=None)

    arrays = ArrayRecord(get_peft_model_state_dict(make_model()))
    gc.collect()
    trained = 0
    losses: list[tuple[int, float]] = []
    for number in range(1, parsed.rounds + 1):
        replies, losses = [], []
        for client in range(parsed.clients.count):
            clock.begin()
            content = RecordDict({"arrays": arrays})
            message = send(Message(content, client + 1, MessageType.TRAIN))
            replies.append(send(train(message, client, number)).content)
            gc.collect()
            clock.end()
            told: Any = replies[-1].metric_records["metrics"]
            losses.append((told["num-examples"], told["loss"]))
            trained += 1
        arrays = aggregate_arrayrecords(replies, "num-examples")
    model = make_model().eval()
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    total = 0.0
    with torch.no_grad():
        for rows in test.in_order_of_length(recipe.batch_size):
            batch = test.batch(rows)
            logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
            total += float(loss_of(logits, batch.labels))
    return {
        **clock.figures(trained),
        **sizes,
        "training loss": sum(n * x for n, x in losses) / sum(n for n, _ in losses),
        "test loss": total / int(test.units.sum()),
    }


def call(way: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Hold a way's rounds in a process of its own."""
    config = run_config(options, folder)
    command = [sys.executable, __file__, "--way", way, "--config", json.dumps(config)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure both ways, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--clients", type=int, default=4, help="all in every round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--examples", type=int, default=32, help="per client")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens per example")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--config", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        clock = Clock()
        hold = ours if options.way == WAYS[0] else theirs
        print("\n" + json.dumps(hold(json.loads(options.config), clock)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not options.model:
            options.model = str(folder / "model")
            save_model(folder / "model", SMALL)
        (folder / "data").mkdir()
        counts = {"train": options.clients * options.examples, "test": 8}
        for seed, (split, count) in enumerate(counts.items()):
            path = folder / "data" / f"{split}.csv"
            save_dialogues(path, options.length, count, seed)
        for number in range(options.repeats):
            for way in WAYS:
                place = folder / f"{number}-{WAYS.index(way)}"
                found[way].append(call(way, options, place))
    figures = {
        way: {name: median(once[name] for once in all_) for name in UNITS}
        for way, all_ in found.items()
    }
    mine, other = (figures[way] for way in WAYS)
    ratios = {name: mine[name] / other[name] for name in UNITS if name not in LOSSES}
    if options.json:
        print(json.dumps({"figures": figures, "ratios": ratios}, indent=2))
        return
    print(f"{'':<18}{WAYS[0]:>14}{WAYS[1]:>16}{'ratio':>8}")
    for name, (unit, form) in UNITS.items():
        mb = " MB" if unit > 1 else ""
        ratio = f"{ratios[name]:.2f}" if name in ratios else ""
        a, b = (format(each[name] / unit, form) for each in (mine, other))
        print(f"{name + mb:<18}{a:>14}{b:>16}{ratio:>8}")


if __name__ == "__main__":
    main()
