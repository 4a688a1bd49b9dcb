"""Write the tables of guides/large-models.md: what clients of large models need.

`python docs/plan_large_models.py` writes them into the page. Models are outlines of the
shapes that their config.json have, so nothing is downloaded or allocated.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

from slora_flwr.backbone.load import Backbone
from slora_flwr.config import RunConfig, parse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.planning.memory import plan_memory
from slora_flwr.planning.outline import outline
from slora_flwr.planning.rounds import plan_rounds, population
from slora_flwr.reports.plan_table import SPEEDS, short, transfer_seconds

PAGE = Path(__file__).parent / "guides" / "large-models.md"
# From their config.json on the Hub.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.2-1B": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "Mistral-7B-v0.3": ("mistral", {"vocab_size": 32768}),
    "Qwen2.5-7B": (
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    ),
    "Llama-3-70B": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
}
METHODS = ("slora", "lora", "fft")
# The columns of the memory: `model.dtype` and `model.quantize`.
WEIGHTS = (
    ("float32", ""),
    ("bfloat16", ""),
    ("bfloat16", "8bit"),
    ("bfloat16", "4bit"),
)
RUN: dict[str, Any] = {
    "train.precision": "float32",  # wherever the page is written
    "task": "causal-lm",
    "rounds": 200,
    "data.name": "vicgalle/alpaca-gpt4",
    "data.max-length": 512,
    "clients.count": 20,
    "clients.per-round": 2,
    "train.batch-size": 16,
    "train.accumulate": 4,
    "train.checkpointing": True,
    "sparse.rounds": 40,
    "lora.rank": 32,
}


def make_outline(
    name: str, method: str, dtype: str = "float32", quantize: str = ""
) -> tuple[RunConfig, Backbone]:
    """Return the run of a model and its outline."""
    kind, sizes = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(kind, **sizes).save_pretrained(folder)
        # A plan needs no tokens, only a tokeniser that has some.
        words = Tokenizer(models.WordLevel({"pad": 0, "end": 1, "a": 2}, "a"))
        PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="pad", eos_token="end"
        ).save_pretrained(folder)
        model = {"name": folder, "dtype": dtype, "quantize": quantize}
        changes = {f"model.{key}": value for key, value in model.items()}
        config = parse(RUN | {"method": method} | changes)
        return config, outline(config)


def write_memory(names: list[str]) -> Iterator[str]:
    """Yield a table of the memory of a client's step, in GB."""
    yield "| model | phase | float32 | bf16 | 8 bits | 4 bits |"
    yield "|---|---|---:|---:|---:|---:|"
    for name in names:
        for method in METHODS:
            # fft trains the weights themselves, in float32.
            weights = WEIGHTS[:1] if method == "fft" else WEIGHTS
            plans = [make_outline(name, method, *kind) for kind in weights]
            for i, phase in enumerate(make_schedule(plans[0][0])):
                cells = ["-"] * len(WEIGHTS)
                for j, (config, shapes) in enumerate(plans):
                    found = plan_memory(make_schedule(config)[i], config, shapes)
                    cells[j] = f"{found.total / 1e9:,.1f}"
                label = _label(method, phase.adapter)
                yield f"| {name} | {label} | {' | '.join(cells)} |"


def write_transfers(names: list[str]) -> Iterator[str]:
    """Yield a table of what is sent, and of the time that it takes."""
    links = " | ".join(SPEEDS)
    yield f"| model | phase | MB a client, both ways | GB in the run | {links} |"
    yield f"|---|---|---:|---:|{'---:|' * len(SPEEDS)}"
    for name in names:
        for method in METHODS:
            config, shapes = make_outline(name, method)
            rounds = plan_rounds(config, shapes, population(config))
            for i, phase in enumerate(make_schedule(config)):
                sent = sum(r.down + r.up for r in rounds if r.phase == i)
                one = sent / phase.rounds / config.clients.per_round
                times = (short(transfer_seconds(one, s)) for s in SPEEDS.values())
                cells = [f"{one / 1e6:,.0f}", f"{sent / 1e9:,.1f}"]
                cells += [f"{seconds} s" for seconds in times]
                label = _label(method, phase.adapter)
                yield f"| {name} | {label} | {' | '.join(cells)} |"


def _label(method: str, adapter: str) -> str:
    return f"`slora`, {adapter}" if method == "slora" else f"`{method}`"


TABLES = {"memory": write_memory, "transfers": write_transfers}


def write_page(page: str) -> str:
    """Return the page with its tables written anew."""
    for kind, write in TABLES.items():
        mark = f"<!-- {kind}: plan_large_models.py -->"
        table = "\n".join([mark, "", *write([*MODELS]), "", f"<!-- {kind} ends -->"])
        page = re.sub(
            f"{re.escape(mark)}.*?<!-- {kind} ends -->",
            lambda _, table=table: table,  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
    return page


if __name__ == "__main__":
    PAGE.write_text(write_page(PAGE.read_text()))
