"""Time and memory of a local training step, method against method, in one run.

Each contender takes turns in a process of its own: full fine-tuning, sparse
fine-tuning the usual way (dense gradients times a mask, dense AdamW), stock PEFT LoRA,
and this project's adapters. Memory is the peak beyond the weights: of the process on a
CPU, of the allocator on a GPU. Ratios are between medians over turns.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODELS: dict[str, dict[str, Any]] = {
    "minilm-l6": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    },
    "distilbert-sized": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    },
}
OWN: dict[str, dict[str, str]] = {
    "sparse": {},
    "rows": {"sparse.mask": "rows"},
    "columns": {"sparse.mask": "columns"},
    "lora": {},
    "fft": {},
}
CONTENDERS = (
    "fft",
    "masked gradients",
    "peft lora",
    "sparse",
    "rows",
    "columns",
    "lora",
)
RATIOS = [
    ("sparse", "fft"),
    ("masked gradients", "fft"),
    ("sparse", "masked gradients"),
    ("rows", "fft"),
    ("columns", "fft"),
    ("rows", "peft lora"),
    ("columns", "peft lora"),
    ("lora", "peft lora"),
]
DENSITY, RANK, LABELS = 0.01, 8, 20
LEARNING_RATE = 1e-4

Step = Callable[[Tensor, Tensor], None]


def make_model(name: str, device: torch.device) -> Any:
    """Make an encoder with random weights; its architecture is what counts here."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(**MODELS[name])
    config.num_labels = LABELS
    model: Any = BertForSequenceClassification(config)
    return model.to(device).train()


def make_step(contender: str, model: Any, bf16: bool) -> Step:
    """Prepare a contender's training step on a batch of token ids and labels."""
    after: Callable[[], None] = lambda: None  # noqa: E731
    before = after
    if contender in OWN:
        from slora_flwr.adapters import make_adapter
        from slora_flwr.config import RecipeConfig, parse
        from slora_flwr.models.backbone import Backbone, find_targets
        from slora_flwr.training.loop import make_optimizer

        model.requires_grad_(False)
        head = dict(model.classifier.named_parameters(prefix="classifier"))
        backbone = Backbone(model, None, find_targets(model), head)
        config = parse({"lora.rank": RANK, "sparse.density": DENSITY, **OWN[contender]})
        kinds = {"fft": "full", "lora": "lora"}
        adapter = make_adapter(kinds.get(contender, "sparse"), config)
        adapter.attach(backbone)
        optimizer = make_optimizer(adapter.parameters(), RecipeConfig(lr=LEARNING_RATE))
        after = adapter.commit
    elif contender == "peft lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(
                r=RANK,
                lora_alpha=2 * RANK,
                target_modules=r".*encoder\.layer\..*(query|key|value|dense)",
                modules_to_save=["classifier"],
            ),
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    else:
        layers = dict(model.bert.encoder.named_modules())
        weights = [m.weight for m in layers.values() if isinstance(m, nn.Linear)]
        model.requires_grad_(False)
        trained = [*weights, *model.classifier.parameters()]
        for parameter in trained:
            parameter.requires_grad_()
        masks = [(torch.rand_like(w) < DENSITY).to(w.dtype) for w in weights]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

        def before() -> None:
            for weight, mask in zip(weights, masks, strict=True):
                assert weight.grad is not None
                weight.grad.mul_(mask)

    def step(ids: Tensor, labels: Tensor) -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        nn.functional.cross_entropy(logits.float(), labels).backward()
        before()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after()

    return step


def measure(contender: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one contender in this process."""
    device = torch.device(options.device)
    model = make_model(options.model[0], device)
    stream = torch.Generator().manual_seed(0)
    shape = (options.batch, options.length)
    ids = torch.randint(1000, 30000, shape, generator=stream).to(device)
    labels = torch.randint(LABELS, (options.batch,), generator=stream).to(device)
    weights = peak(device, reset=True)
    step = make_step(contender, model, options.bf16)
    for _ in range(options.warm_up):
        step(ids, labels)
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        step(ids, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds),
        "bytes": peak(device) - weights,
    }


def peak(device: torch.device, reset: bool = False) -> int:
    """Give the most memory used since the last reset, or now if it resets."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) * 1024


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Let the contenders take turns, for each model."""
    found: dict[str, Any] = {}
    for name in options.model:
        turns: dict[str, list[dict[str, float]]] = {c: [] for c in CONTENDERS}
        for _ in range(options.turns):
            for contender in CONTENDERS:
                command = [sys.executable, __file__, *sys.argv[1:], "--model", name]
                done = subprocess.run(
                    [*command, "--child", contender],
                    stdout=subprocess.PIPE,
                    check=True,
                    text=True,
                )
                turns[contender].append(json.loads(done.stdout))
        figures = {
            contender: {
                key: statistics.median(turn[key] for turn in taken)
                for key in ("seconds", "bytes")
            }
            for contender, taken in turns.items()
        }
        ratios = {
            f"{one} / {other}": {
                key: figures[one][key] / figures[other][key]
                for key in ("seconds", "bytes")
            }
            for one, other in RATIOS
        }
        found[name] = {"figures": figures, "ratios": ratios}
    return found


def lines(found: dict[str, Any]) -> Iterable[str]:
    """Write the figures for a reader."""
    for model, part in found.items():
        yield f"{model}: milliseconds a step, MB beyond the weights"
        for contender, figures in part["figures"].items():
            seconds, size = figures["seconds"], figures["bytes"]
            yield f"  {contender:<18} {1e3 * seconds:8.1f} ms {size / 1e6:8.1f} MB"
        for pair, ratio in part["ratios"].items():
            seconds, size = ratio["seconds"], ratio["bytes"]
            yield f"  {pair:<28} time {seconds:.2f}  memory {size:.2f}"


def main() -> None:
    """Compare, or be one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.model = options.model[-1:]
        print(json.dumps(measure(options.child, options)))
        return
    options.model = options.model or list(MODELS)
    found = compare(options)
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines(found)))


if __name__ == "__main__":
    main()
