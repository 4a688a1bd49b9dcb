"""One client's local training, and evaluation."""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from slora_flwr.adapters.base import Adapter
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.random import key
from slora_flwr.config import RecipeConfig
from slora_flwr.data.examples import Examples
from slora_flwr.training.metrics import Evaluation, count


def train(
    backbone: Backbone,
    adapter: Adapter,
    examples: Examples,
    recipe: RecipeConfig,
    rng_key: tuple[object, ...],
) -> float:
    """Train an attached adapter from the state it has loaded.

    Parameters
    ----------
    backbone : Backbone
        The resident backbone.
    adapter : Adapter
        The adapter attached to it.
    examples : Examples
        One client's examples.
    recipe : RecipeConfig
        Local training. FedProx (arXiv 1812.06127): `prox` adds mu/2 ‖w - w_sent‖² to
        the loss.
    rng_key : tuple
        Keys the order of the batches and dropout: (seed, round, client).

    Returns
    -------
    float
        Mean loss over the examples of all epochs, NaN without any.
    """
    stream = np.random.Philox(key=key("train", *rng_key))
    torch.manual_seed(int(stream.random_raw()) >> 1)
    parameters = adapter.parameters()
    optimizer = make_optimizer(parameters, recipe)
    sent = [p.detach().clone() for p in parameters] if recipe.prox else []
    model = backbone.model.train()
    losses: list[Tensor] = []
    size = len(examples) / max(1, -(-len(examples) // recipe.batch_size))
    for _ in range(recipe.epochs):
        for rows in examples.shuffled(recipe.batch_size, stream):
            ids, mask, labels = (t.to(backbone.device) for t in examples.batch(rows))
            with precision_of(backbone, recipe.precision):
                logits = model(input_ids=ids, attention_mask=mask).logits
            # Over the mean size of batches: all examples weigh the same.
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / size
            loss.backward()
            for parameter, origin in zip(parameters, sent, strict=False):
                if parameter.grad is not None:  # None if the loss does not use it
                    parameter.grad.add_(parameter.detach() - origin, alpha=recipe.prox)
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            adapter.commit()
            losses.append(loss.detach())
    # One transfer from the device at the end instead of one per step.
    return float(torch.stack(losses).mean()) if losses else float("nan")


def evaluate(
    backbone: Backbone,
    examples: Examples,
    precision: str = "float32",
    batch_size: int = 64,
) -> Evaluation:
    """Evaluate the backbone as it is now, attached adapter included."""
    model = backbone.model.eval()
    predicted = np.empty(len(examples), dtype=np.int64)
    total = 0.0
    with torch.inference_mode(), precision_of(backbone, precision):
        for rows in examples.in_order_of_length(batch_size):
            ids, mask, labels = (t.to(backbone.device) for t in examples.batch(rows))
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            predicted[rows] = logits.argmax(dim=-1).cpu().numpy()
    counts = count(predicted, examples.labels, model.config.num_labels)
    return Evaluation(total / len(examples), counts)


def make_optimizer(
    parameters: list[nn.Parameter], recipe: RecipeConfig
) -> torch.optim.Optimizer:
    """Return the local optimiser of the parameters that an adapter trains."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
    # Fused: one pass over each parameter, where the default makes several.
    return torch.optim.AdamW(
        parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )


def precision_of(backbone: Backbone, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bf16 autocast, or none."""
    if precision == "bf16" or backbone.model.dtype == torch.bfloat16:
        return torch.autocast(backbone.device.type, torch.bfloat16)
    return nullcontext()
