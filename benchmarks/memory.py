"""Measure the memory of whole runs of slora on the in-process engine.

Server and nodes live in one process here, so its peak tells how often a run holds the
backbone. Models are random BERTs of about 100 and 400 million weights; few rounds, tiny
data and short texts keep activations small. Memory is the process's peak minus what it
holds after such a run of the small embedded model. It is divided by the size of the
weights and of one state of each phase.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Million weights -> hidden size, layers.
SIZES = {100: (768, 12), 400: (1280, 19)}
VOCABULARY = 20_000
WORDS = [f"w{i}" for i in range(VOCABULARY)]
CLASSES = ("apples", "bridges")


def save_model(folder: Path, hidden: int, layers: int, dtype: str) -> None:
    """Save a random BERT with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).to(getattr(torch, dtype)).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", unk_token="w1"
    ).save_pretrained(folder)


def save_texts(path: Path) -> None:
    """Save texts of eight words that tell the class."""
    draw, rows = random.Random(0), ["text,label"]
    for i in range(60):
        words = draw.choices(WORDS[20 * (i % 2) + 2 :][:20], k=8)
        rows.append(f"{' '.join(words)},{CLASSES[i % 2]}")
    path.write_text("\n".join(rows) + "\n")


def resident_bytes() -> int:
    """Return what this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run slora in this process; return its peak, and that over weights and states."""
    from slora_flwr.backbone.load import load_backbone
    from slora_flwr.config import ModelConfig, parse
    from slora_flwr.config.schedule import make_schedule
    from slora_flwr.engines.inline import run_inline

    config: dict[str, Any] = {
        "method": "slora",
        "rounds": 4,
        "sparse.rounds": 2,
        "model.name": str(folder / "model"),
        "model.dtype": options.dtype,
        "data.name": str(folder / "texts.csv"),
        "data.max-length": 8,
        "clients.count": 6,
        "clients.per-round": 2,
        "clients.partitioner": "iid",
        "train.batch-size": 2,
        "train.epochs": 1,
        "run.dir": str(folder / "run"),
    }
    settings = parse(config)
    if options.sizes_only:
        backbone = load_backbone(ModelConfig(str(folder / "model")), len(CLASSES), 0)
        states = [
            phase.adapter_type.state_size(settings, backbone)
            for phase in make_schedule(settings)
        ]
        head = backbone.head_size
        width = 4 if options.dtype == "float32" else 2
        weights = width * (backbone.size - head) + 4 * head
        return {"weights": weights, "states": 4 * sum(states)}
    # The same run of the small embedded model loads what all runs need.
    small = {**config, "model.name": "embedded", "run.dir": str(folder / "small")}
    run_inline(small | {"model.dtype": "float32"}, nodes=2)
    before = resident_bytes()
    run_inline(config, nodes=2)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak": peak - before}


def call(folder: Path, *options: str) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--child", str(folder), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, nargs="+", default=[*SIZES])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--sizes-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child and options.model:
        hidden, layers = options.model
        save_model(options.child / "model", hidden, layers, options.dtype)
        save_texts(options.child / "texts.csv")
        print("{}")
        return
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    figures = {}
    for millions in options.millions:
        dtype = ("--dtype", options.dtype)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            call(folder, "--model", *map(str, SIZES[millions]), *dtype)
            found = call(folder, "--sizes-only", *dtype) | call(folder, *dtype)
        found["ratio"] = found["peak"] / (found["weights"] + found["states"])
        figures[f"{millions} million weights"] = found
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for size, found in figures.items():
        parts = (f"{k} {found[k] / 1e6:,.0f} MB" for k in ("weights", "states", "peak"))
        print(f"{size}: {', '.join(parts)}, ratio {found['ratio']:.2f}")


if __name__ == "__main__":
    main()
