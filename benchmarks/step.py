"""Compare the time and memory of a local training step between methods.

The contenders are full fine-tuning, sparse fine-tuning the usual way (dense gradients
times a mask, dense AdamW), stock PEFT LoRA, and this project's adapters. All use
PyTorch's fused AdamW. Each runs in a separate process, and they take turns step by
step, so that other load on the machine affects all alike. A ratio of times is the
median over turns of the ratio within a turn. Memory is the peak beyond the weights: of
the process on a CPU, of the allocator on a GPU. The share of the matrix rate is the
rate of the step's floating point operations in matrix products, divided by that of one
large product.
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

import peft
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from slora_flwr.backbone.attention import replace_attention
from slora_flwr.backbone.dropout import replace_dropout
from slora_flwr.backbone.first_token import cut_last_block
from slora_flwr.backbone.load import Backbone, find_targets
from slora_flwr.backbone.remade import mark_outputs
from slora_flwr.common.memory import keep_freed
from slora_flwr.config import RecipeConfig, parse
from slora_flwr.config.methods import find_adapter
from slora_flwr.training.loop import make_optimizer

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    },
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
}
CONTENDERS = ("fft", "masked gradients", "peft lora", *OWN)
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
    """Return an encoder with random weights, since only its architecture matters."""
    torch.manual_seed(0)
    config = BertConfig(**MODELS[name])
    config.num_labels = LABELS
    model: Any = BertForSequenceClassification(config)
    return model.to(device).train()


def make_step(contender: str, model: Any, bf16: bool) -> Step:
    """Return a contender's training step on a batch of token ids and labels."""
    before: Callable[[], None] = lambda: None  # noqa: E731
    after = before
    if contender in OWN:
        model.requires_grad_(False)
        mark_outputs(model)
        replace_dropout(model)
        replace_attention(model)
        cut_last_block(model, pad=0)
        model.train()
        head = dict(model.classifier.named_parameters(prefix="classifier"))
        backbone = Backbone(model, None, find_targets(model), head)
        config = parse({"lora.rank": RANK, "sparse.density": DENSITY, **OWN[contender]})
        kind = "lora" if contender == "lora" else "sparse"
        adapter = find_adapter(kind).from_config(config)
        adapter.attach(backbone)
        optimizer = make_optimizer(adapter.parameters(), RecipeConfig(lr=LEARNING_RATE))
        after = adapter.commit
    elif contender == "peft lora":
        lora = peft.LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=r".*encoder\.layer\..*(query|key|value|dense)",
            modules_to_save=["classifier"],
        )
        model = peft.get_peft_model(model, lora)
        optimizer = _adamw([p for p in model.parameters() if p.requires_grad])
    elif contender == "masked gradients":
        layers = model.bert.encoder.modules()
        weights = [m.weight for m in layers if isinstance(m, nn.Linear)]
        model.requires_grad_(False)
        trained = [*weights, *model.classifier.parameters()]
        for parameter in trained:
            parameter.requires_grad_()
        masks = [(torch.rand_like(w) < DENSITY).to(w.dtype) for w in weights]
        optimizer = _adamw(trained)

        def before() -> None:
            for weight, mask in zip(weights, masks, strict=True):
                assert weight.grad is not None
                weight.grad.mul_(mask)

    else:
        optimizer = _adamw(list(model.parameters()))

    def step(ids: Tensor, labels: Tensor) -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        nn.functional.cross_entropy(logits.float(), labels).backward()
        before()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after()

    return step


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def contend(contender: str, options: argparse.Namespace) -> None:
    """Act as one contender: print memory and work, then do a step per line read."""
    device = torch.device(options.device)
    model = make_model(options.model[0], device)
    stream = torch.Generator().manual_seed(0)
    shape = (options.batch, options.length)
    ids = torch.randint(1000, 30000, shape, generator=stream).to(device)
    labels = torch.randint(LABELS, (options.batch,), generator=stream).to(device)
    # So that imports, and code that is read from disk, are not counted as the step's.
    make_step(contender, make_model("tiny", device), options.bf16)(ids[:2], labels[:2])
    weights = peak(device, reset=True)
    if contender in OWN:
        keep_freed()
    step = make_step(contender, model, options.bf16)
    for _ in range(3):
        step(ids, labels)
    memory = peak(device) - weights
    with FlopCounterMode(display=False) as counted:
        step(ids, labels)
    told = {"bytes": memory, "flops": counted.get_total_flops()}
    print(json.dumps(told), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step(ids, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - started, flush=True)


def matrix_rate(device: torch.device, bf16: bool) -> float:
    """Return the floating point operations per second of one large product."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return 2 * n**3 / min(taken)


def peak(device: torch.device, reset: bool = False) -> int:
    """Return the peak memory since the last reset, or the present one after a reset."""
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


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the contenders, in turns, on a model."""
    children, told = [], {}
    for contender in CONTENDERS:
        command = [sys.executable, __file__, *sys.argv[1:], "--model", name]
        child = subprocess.Popen(
            [*command, "--child", contender],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        # One after the other, so that no start-up disturbs another's measurement.
        told[contender] = json.loads(_read(child))
    turns = [[_step(child) for child in children] for _ in range(options.turns)]
    for child in children:
        child.communicate()
    rate = matrix_rate(torch.device(options.device), options.bf16)
    seconds = dict(zip(CONTENDERS, zip(*turns, strict=True), strict=True))
    tokens = options.batch * options.length
    figures = {}
    for contender in CONTENDERS:
        taken = statistics.median(seconds[contender])
        figures[contender] = {
            "seconds": taken,
            "bytes": told[contender]["bytes"],
            "tokens a second": tokens / taken,
            "share of the matrix rate": told[contender]["flops"] / taken / rate,
        }
    ratios = {}
    for one, other in RATIOS:
        pairs = zip(seconds[one], seconds[other], strict=True)
        ratios[f"{one} / {other}"] = {
            "seconds": statistics.median(a / b for a, b in pairs),
            "bytes": told[one]["bytes"] / told[other]["bytes"],
        }
    return {"figures": figures, "ratios": ratios}


def _read(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None
    return child.stdout.readline()


def _step(child: "subprocess.Popen[str]") -> float:
    assert child.stdin is not None
    print(file=child.stdin, flush=True)
    return float(_read(child))


def lines(found: dict[str, Any]) -> Iterable[str]:
    """Yield the figures as lines of text."""
    for model, part in found.items():
        yield (
            f"{model}: milliseconds per step, MB beyond the weights, tokens per "
            "second, share of the matrix rate"
        )
        for contender, figures in part["figures"].items():
            seconds, size, tokens, share = figures.values()
            yield (
                f"  {contender:<18} {1e3 * seconds:8.1f} ms {size / 1e6:8.1f} MB "
                f"{tokens:9.0f} {100 * share:4.0f}%"
            )
        for pair, ratio in part["ratios"].items():
            seconds, size = ratio.values()
            yield f"  {pair:<28} time {seconds:.2f}  memory {size:.2f}"


def main() -> None:
    """Compare all contenders, or act as one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.model = options.model[-1:]
        contend(options.child, options)
        return
    found = {name: compare(name, options) for name in options.model or [*MODELS][1:]}
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines(found)))


if __name__ == "__main__":
    main()
