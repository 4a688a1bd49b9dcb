"""Greedy generation: what a language model says to prompts and dialogues."""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from slora_flwr.config import ConfigError
from slora_flwr.data.dialogues import Dialogue

# Prompts of a batch, all of the same length.
_BATCH = 32


def respond(
    model: Any, encoder: Any, dialogues: Sequence[Dialogue], most: int
) -> list[str]:
    """Return the model's responses to dialogues.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, in evaluation mode.
    encoder : DialogueEncoder
        What makes tokens of dialogues. Those beyond `longest_prompt` lose their middle.
    dialogues : Sequence[Dialogue]
        The dialogues, each of which ends with a prompt.
    most : int
        The most tokens of a response.
    """
    longest = longest_prompt(model, encoder, most)
    prompts = [encoder.prompt(dialogue, longest) for dialogue in dialogues]
    return generate(model, encoder.tokenizer, prompts, most)


def longest_prompt(model: Any, encoder: Any, most: int) -> int:
    """Return the most tokens of a prompt: as in training, with room for a response.

    The room within the model's positions is `most` tokens, or a quarter of those in
    training if they are fewer.
    """
    whole: int = encoder.max_length
    return min(whole, _positions(model) - min(most, whole // 4))


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int
) -> list[str]:
    """Return the most probable continuations, token by token, up to the end token.

    Prompts of a batch have the same length, so that none is padded: padding changes
    what some models compute.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, in evaluation mode.
    tokenizer : transformers.PreTrainedTokenizerFast
        Its tokenizer.
    prompts : Sequence[Sequence[int]]
        The prompts' tokens.
    most : int
        The most tokens of a response, within the model's positions.

    Raises
    ------
    ConfigError
        If a prompt leaves no room for a response.
    """
    # Imported here, since it takes seconds.
    from transformers import GenerationConfig

    found = [""] * len(prompts)
    positions = _positions(model)
    longest = max(map(len, prompts), default=0)
    if longest >= positions:
        raise ConfigError(
            f"a prompt has {longest} tokens; allowed: fewer than the model's "
            f"{positions} positions, so that there is room for a response"
        )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for batch in _batches(order, prompts):
        ids = torch.tensor([list(prompts[i]) for i in batch], device=model.device)
        recipe = GenerationConfig(
            max_new_tokens=min(most, positions - ids.shape[1]),
            do_sample=False,
            eos_token_id=_ends(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.inference_mode():
            given = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=recipe
            )
        texts = tokenizer.batch_decode(
            given[:, ids.shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(batch, texts, strict=True):
            found[i] = text.strip()
    return found


def _positions(model: Any) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", sys.maxsize))


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a response: the tokenizer's, and the model's own."""
    own = getattr(model.generation_config, "eos_token_id", None)
    others = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *(x for x in others if x is not None)})


def _batches(order: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return prompts in batches of one length each."""
    batches: list[list[int]] = []
    for i in order:
        last = batches[-1] if batches else []
        if last and len(last) < _BATCH and len(prompts[last[0]]) == len(prompts[i]):
            last.append(i)
        else:
            batches.append([i])
    return batches
