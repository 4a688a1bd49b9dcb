"""A last block that computes only what a classifier reads: its first token.

The classifiers of BERT and its relatives read the first token of the last block. The
other tokens' attention output and feed-forward layers, five sixths of the block,
change nothing, forwards or backwards.
"""

from typing import Any

import torch
from torch import Tensor, nn

# By the name of a family's list of blocks: the modules of a block from whose inputs on
# each token is by itself.
_PLACES = {
    "encoder.layer": ("attention.output",),
    "transformer.layer": ("attention.out_lin", "sa_layer_norm"),
}


def cut_last_block(model: Any, pad: int, *, check: bool = True) -> bool:
    """Have a classifier's last block go on with the first token alone.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A sequence classifier.
    pad : int
        The padding token.
    check : bool
        Whether the model must be seen to compute the same so; a model of shapes alone
        cannot be.

    Returns
    -------
    bool
        Whether it does so now. It does not if the family has other blocks, or its
        classifier reads other tokens.
    """
    places = _find_places(model.base_model)
    if not places:
        return False
    if check:
        model.eval()
        size = model.get_input_embeddings().num_embeddings
        stream = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (2, 6), generator=stream).to(model.device)
        mask = torch.ones_like(ids)
        ids[0, 4:], mask[0, 4:] = pad, 0
        whole = _logits(model, ids, mask)
    hooks = [place.register_forward_pre_hook(_keep_first) for place in places]
    if check:
        # Products of one row and of many are rounded differently.
        rough = max(1e-5, 4 * torch.finfo(model.base_model.dtype).eps)
        cut = _logits(model, ids, mask)
        if not torch.allclose(
            cut, whole, rtol=rough, atol=rough * float(whole.abs().max())
        ):
            for hook in hooks:
                hook.remove()
            return False
    return True


def _find_places(body: nn.Module) -> list[nn.Module]:
    for name, inner in _PLACES.items():
        try:
            blocks = body.get_submodule(name)
            return [blocks[-1].get_submodule(place) for place in inner]  # type: ignore[index]
        except (AttributeError, IndexError, TypeError):
            continue
    return []


@torch.inference_mode()
def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    # The head is float32, whatever the body is.
    is_half = model.base_model.dtype == torch.bfloat16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=is_half):
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits.float()


def _keep_first(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Contiguous, since a view would keep all tokens for the backward pass.
    return tuple(tensor[:, :1].contiguous() for tensor in given)
