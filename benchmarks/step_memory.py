"""Compare the memory that `slora plan` says a client needs with what it takes.

Each case is a process of its own: it loads a causal language model, attaches a phase's
adapter over its base, and trains a client on full batches. Its peak is that of its
resident memory in training, minus what it held before the model was loaded: the
libraries, after a step of a tiny model, and the tokenizer with the tokens. While a
model loads, pages of its file count as resident too, though the system may drop them.
Without `--model` the model is a random Llama of about 20 million weights.

glibc keeps freed blocks for later ones of other sizes, and the more the longer a
process trains. `peak` is measured with `MALLOC_MMAP_THRESHOLD_`, which has it give
large blocks back at once, and with `--defaults` without too.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Method and the phase of it; weights, a type or the bits that hold them, packed; what
# is changed besides.
CASES: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "lora, float32": ("lora", 0, "float32", {}),
    "lora, bfloat16": ("lora", 0, "bfloat16", {}),
    "slora sparse, float32": ("slora", 0, "float32", {}),
    "slora sparse, bfloat16": ("slora", 0, "bfloat16", {}),
    "slora low-rank, float32": ("slora", 1, "float32", {}),
    "slora low-rank, bfloat16": ("slora", 1, "bfloat16", {}),
    "fft, float32": ("fft", 0, "float32", {}),
    "lora, checkpointing": ("lora", 0, "float32", {"train.checkpointing": True}),
    "fft, in two parts": ("fft", 0, "float32", {"train.accumulate": 2}),
    "lora, 8bit": ("lora", 0, "8bit", {}),
    "lora, 4bit": ("lora", 0, "4bit", {}),
    "slora sparse, 8bit": ("slora", 0, "8bit", {}),
    "slora sparse, 4bit": ("slora", 0, "4bit", {}),
    "slora low-rank, 4bit": ("slora", 1, "4bit", {}),
}
WORDS = [f"w{i}" for i in range(8000)]
# glibc's: blocks from this size on are given back when they are freed.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}
SMALL: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
}


def save_model(folder: Path, sizes: dict[str, Any]) -> None:
    """Save a random Llama with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=len(WORDS), num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w2"
    ).save_pretrained(folder)


def save_texts(path: Path, length: int, count: int) -> None:
    """Save texts that fill the length with any tokenizer."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text"])
        rows.writerows([f"w{i} " + "w3 " * length] for i in range(count))


def status(field: str) -> int:
    """Return a field of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [found] = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(found)


def train(config: dict[str, Any], phase_index: int) -> dict[str, int]:
    """Train one client in a phase; return what is planned, and the peak."""
    import torch

    from slora_flwr.backbone.base_weights import BaseWeights
    from slora_flwr.config import parse
    from slora_flwr.config.schedule import make_schedule
    from slora_flwr.planning.memory import plan_memory
    from slora_flwr.planning.outline import outline
    from slora_flwr.training.trainer import Trainer

    settings = parse(config)
    phase = make_schedule(settings)[phase_index]
    before = make_schedule(settings)[phase_index - 1].rounds if phase_index else 0
    planned = plan_memory(phase, settings, outline(settings)).total
    trainer = Trainer(settings)
    _ = trainer.data.tokenised
    resident = status("VmRSS")
    layout = phase.adapter_type.base_layout(
        phase, settings, trainer.model.backbone, before
    )
    shapes, positions, scaling = layout
    base = None
    if shapes:
        state = {name: torch.full(shape, 1e-3) for name, shape in shapes.items()}
        base = BaseWeights.from_state(state, positions, scaling)
    del layout, positions
    adapter = trainer.model.attach(phase, base)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    trainer.train_client(0, adapter.state(), phase, 1)
    return {"planned": planned, "peak": status("VmHWM") - resident}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """Train in this process, a tiny model first; return what `train` does."""
    method, phase, dtype, changes = CASES[options.case]
    config = {
        "task": "causal-lm",
        "method": method,
        "model.name": str(folder / "tiny"),
        "model.quantize" if "bit" in dtype else "model.dtype": dtype,
        "data.name": str(folder / "texts.csv"),
        "data.text": "text",
        "data.template": "plain",
        "data.max-length": options.length,
        "clients.count": 1,
        "clients.per-round": 1,
        "clients.partitioner": "iid",
        "clients.by": "text",
        "train.batch-size": options.batch,
        "train.steps": 2,  # the second has moments from its beginning
    }
    train(config | changes, phase)
    return train(config | changes | {"model.name": options.model}, phase)


def call(*options: str, **changes: str) -> dict[str, int]:
    """Measure in a process of its own, with changes of its environment."""
    command = [sys.executable, __file__, *options]
    environment = os.environ | changes
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--defaults", action="store_true", help="glibc's, too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "tiny", TINY)
        model = options.model
        if not model:
            model = str(folder / "small")
            save_model(folder / "small", SMALL)
        # A fifth is set aside for tests, and the rest makes a few batches.
        save_texts(folder / "texts.csv", options.length, 4 * options.batch)
        sizes = ("--batch", str(options.batch), "--length", str(options.length))
        for case in options.cases:
            one = ("--child", str(folder), "--case", case, "--model", model)
            figures[case] = call(*one, *sizes, **GIVE_BACK)
            if options.defaults:
                kept = call(*one, *sizes)["peak"]
                figures[case]["with glibc's defaults"] = kept
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for case, found in figures.items():
        off = found["planned"] / found["peak"] - 1
        parts = (f"{key} {size / 1e6:,.0f} MB" for key, size in found.items())
        print(f"{case}: {', '.join(parts)}; the plan is {off:+.1%}", flush=True)


if __name__ == "__main__":
    main()
