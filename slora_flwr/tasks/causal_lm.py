"""Causal language modelling: responses to prompts, token by token."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from slora_flwr.common.text import printable
from slora_flwr.config import DataConfig, RunConfig, refuse
from slora_flwr.data.dialogues import Dialogue, ask
from slora_flwr.data.examples import IGNORED, Batch, Examples
from slora_flwr.data.texts import Texts
from slora_flwr.tasks.base import Answer, Evaluation, Probe, Sample, Task
from slora_flwr.tasks.generation import generate, respond
from slora_flwr.tasks.multiple_choice import ChoiceProbe
from slora_flwr.tasks.responses import ResponseProbe
from slora_flwr.tasks.template import DialogueEncoder, Template

# The most logits that are held at a time: 64 MB in float32.
_MOST_LOGITS = 2**24
_NO_LABELS = "task is causal-lm, which has no labels"
# The most tokens of a response.
MOST_TOKENS = 256
# The tokens on which a model's own logits are compared with those of `project`.
_TRIED = 8
# The number of sample answers, and the most tokens of each.
_SAMPLES, _SAMPLE_TOKENS = 3, 48

_USAGE = """\
import torch

model.eval()
# The text around the prompt is the one of the training.
asked = ASKED
given = tokenizer(
    asked, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt"
)
with torch.no_grad():
    said = model.generate(**given, max_new_tokens=64, do_sample=False)
start = given["input_ids"].shape[1]
print(tokenizer.decode(said[0, start:], skip_special_tokens=True))
"""


@dataclass(frozen=True)
class TokenEvaluation(Evaluation):
    """The results of a language model on some examples.

    `counts` has shape (3,): right predictions, predicted tokens, and examples.
    """

    names = ("hits", "tokens", "examples")

    @property
    def examples(self) -> int:
        """Number of examples."""
        return int(self.counts[2])

    @property
    def units(self) -> int:
        """Number of predicted tokens."""
        return int(self.counts[1])

    @property
    def accuracy(self) -> float:
        """Share of the tokens that are the most probable ones."""
        return float(self.counts[0] / self.counts[1])

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss; infinite where it overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Response(Answer):
    """A prompt, and what the model says to it."""

    prompt: str
    response: str

    @property
    def line(self) -> str:
        """The response."""
        return printable(self.response, 2000)

    @property
    def facts(self) -> dict[str, Any]:
        """All that is known of it, for JSON."""
        return {"prompt": self.prompt, "response": self.response}


class CausalLM(Task):
    """Give each prompt its response, by the pretrained language model itself."""

    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    pipeline = "text-generation"
    metrics = ("perplexity", "accuracy", "loss")
    extras = ("exact_match", "rouge_l", "choice_accuracy")
    goal = "loss"
    has_classes = False

    def check(self, config: RunConfig) -> None:
        """Refuse labels and impossible targets; see `Task.check`."""
        if config.data.labels:
            raise refuse(
                "data.labels", config.data.labels, f"empty, since {_NO_LABELS}"
            )
        if 0 < config.run.target < 1:
            allowed = "a perplexity, which is from 1 up, or 0"
            raise refuse("run.target", config.run.target, allowed)

    def encoder(self, config: DataConfig, tokenizer: Any) -> DialogueEncoder:
        """Return what makes tokens of dialogues; see `Task.encoder`."""
        template = Template(config.template, tokenizer)
        return DialogueEncoder(tokenizer, config.max_length, template)

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Return the loss, negated."""
        return -metrics["loss"] if "loss" in metrics else None

    def reaches(self, metrics: Mapping[str, float], target: float) -> bool:
        """Return whether the perplexity is at most the target."""
        return metrics.get("perplexity", math.inf) <= target

    def spoil(self, examples: Examples, classes: Sequence[str]) -> Examples:
        """Return the examples with learned tokens of other places."""
        assert examples.learned is not None
        at = np.flatnonzero(examples.learned)
        tokens = examples.tokens.copy()
        tokens[at] = np.roll(tokens[at], len(at) // 2)
        return replace(examples, tokens=tokens)

    def outputs(self, classes: Sequence[str]) -> None:
        """Return None: it has no head of its own."""
        return

    def longest_text(self, data: DataConfig) -> int | None:
        """Return None: what is generated may be longer than what was learned."""
        return None

    def run(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        """Run a model on texts, without the logits, which may be large."""
        hidden_states(model, ids, mask)

    def misfit(self, model: Any) -> str:
        """Return what keeps the task from using a model; empty if nothing does."""
        ids = torch.arange(_TRIED, device=model.device)[None]
        mask = torch.ones_like(ids)
        theirs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        error = (project(model, hidden_states(model, ids, mask)) - theirs).abs().max()
        # Kernels round differently, by the type in which they compute.
        share = max(1e-4, 2 * torch.finfo(theirs.dtype).eps)
        if bool(error <= share * theirs.abs().max()):
            return ""
        return (
            f"{type(model).__name__} makes logits otherwise than by an output layer "
            "with a scale or a soft cap"
        )

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the sum of the cross-entropies of the learned tokens."""
        hidden, labels = _positions(model, batch)
        total = hidden.new_zeros((), dtype=torch.float32)
        for states, right in _chunks(model, hidden, labels):
            if len(labels) == len(right):
                total = total + _cross_entropy(model, states, right)
            else:  # The logits are made again in the backward pass, not kept until it.
                total = total + checkpoint(
                    _cross_entropy, model, states, right, use_reentrant=False
                )
        return total

    def output_bytes(self, model: Any, tokens: int) -> int:
        """Return the bytes of a chunk's log-probabilities and of two gradients.

        They are float32: the gradients of the log-probabilities and of the logits. The
        logits themselves are not there then. Trained output weights have a gradient for
        each chunk, which autograd adds to the sum so far outside of both.
        """
        weight = model.get_output_embeddings().weight
        rows = max(1, _MOST_LOGITS // weight.shape[0])
        logits = 4 * min(tokens, rows) * weight.shape[0]
        made = 4 * weight.numel() if weight.requires_grad else 0
        if tokens <= rows:
            return max(3 * logits, logits + made)
        return max(3 * logits + made, 3 * made)

    def evaluate(self, model: Any, batches: Iterable[Batch]) -> TokenEvaluation:
        """Return a model's results on batches; there is at least one."""
        total, counts = 0.0, np.zeros(3, dtype=np.int64)
        for batch in batches:
            counts[2] += len(batch.ids)
            for states, right in _chunks(model, *_positions(model, batch)):
                logits = project(model, states).float()
                total += float(F.cross_entropy(logits, right, reduction="sum"))
                counts[0] += int((logits.argmax(dim=-1) == right).sum())
                counts[1] += len(right)
        return TokenEvaluation(total / max(1, int(counts[1])), counts)

    def probes(
        self, config: RunConfig, encoder: Any, asked: Sequence[Dialogue]
    ) -> list[Probe]:
        """Return what measures responses and choices; see `Task.probes`."""
        run, found = config.run, list[Probe]()
        if run.generate:
            found.append(ResponseProbe(encoder, asked, run.max_tokens, run.generate))
        if run.choices:
            found.append(ChoiceProbe(encoder, run.choices, log_likelihoods))
        return found

    def answer(
        self,
        model: Any,
        encoder: DialogueEncoder,
        classes: Sequence[str],
        texts: Texts,
        most: int | None = None,
    ) -> Iterator[Response]:
        """Yield the responses to dialogues; see `Task.answer`."""
        responses = respond(model, encoder, texts.dialogues, most or MOST_TOKENS)
        for text, response in zip(texts.texts, responses, strict=True):
            yield Response(text, response)

    def sample(
        self, model: Any, encoder: DialogueEncoder, examples: Examples
    ) -> list[Sample]:
        """Return the responses to prompts from all over the examples.

        See `Task.sample`. Texts that are learned themselves have no prompts.
        """
        count = min(_SAMPLES, len(examples))
        rows = [len(examples) * (2 * i + 1) // (2 * count) for i in range(count)]
        found = [_ask(examples, row) for row in rows]
        found = [(prompt, right) for prompt, right in found if len(prompt) > 1]
        prompts = [prompt for prompt, _ in found]
        tokenizer = encoder.tokenizer
        said = generate(model, tokenizer, prompts, _SAMPLE_TOKENS)
        texts = [
            [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in pair]
            for pair in found
        ]
        return [
            Sample(prompt, right, response)
            for (prompt, right), response in zip(texts, said, strict=True)
        ]

    def describe(self, classes: int) -> str:
        """Return what a model of the task is, as a sentence for its card."""
        return "A language model that responds to prompts."

    def usage(self, encoder: DialogueEncoder) -> str:
        """Return Python that has `model` answer, with stock transformers."""
        asked = encoder.template.prompt(ask(["What is it?"]))
        return _USAGE.replace("ASKED", json.dumps(asked, ensure_ascii=False))

    def read(
        self, loss: float, counts: Mapping[str, Any], classes: int
    ) -> TokenEvaluation:
        """Return the evaluation that a node has sent; see `Task.read`."""
        given = [counts[name] for name in TokenEvaluation.names]
        found = TokenEvaluation(loss, np.array(given, dtype=np.int64))
        if found.counts.shape != (3,):
            raise ValueError(found)
        hits, tokens, examples = found.counts
        if not (0 <= hits <= tokens and 0 < examples <= tokens):
            raise ValueError(found)
        return found


def log_likelihoods(model: Any, batch: Batch) -> Tensor:
    """Return the log-likelihood of each row's learned tokens; shape (rows,)."""
    rows, _ = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    losses = [
        F.cross_entropy(project(model, states).float(), right, reduction="none")
        for states, right in _chunks(model, *_positions(model, batch))
    ]
    found = torch.zeros(len(batch.ids), device=rows.device)
    return found.index_add(0, rows, -torch.cat(losses))


def _ask(examples: Examples, row: int) -> tuple[list[int], list[int]]:
    """Return an example's tokens before its last response, and those of it."""
    assert examples.learned is not None
    place = slice(examples.offsets[row], examples.offsets[row + 1])
    ids, learned = examples.tokens[place].tolist(), examples.learned[place].tolist()
    end = len(ids) - learned[::-1].index(True)
    first = end
    while learned[first - 1]:
        first -= 1
    return ids[:first], ids[first:end]


def project(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits of hidden states, as the model's own forward pass has them."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def hidden_states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the last hidden states; shape (rows, length, width)."""
    found = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    states: Tensor = found.last_hidden_state
    return states


def _positions(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the hidden states before learned tokens, and those tokens."""
    hidden = hidden_states(model, batch.ids, batch.mask)[:, :-1]
    labels = batch.labels[:, 1:]
    at = labels != IGNORED
    return hidden[at], labels[at]


def _chunks(
    model: Any, hidden: Tensor, labels: Tensor
) -> Iterable[tuple[Tensor, Tensor]]:
    """Return positions in chunks, of which the logits fit into the bound."""
    rows = max(1, _MOST_LOGITS // model.get_output_embeddings().weight.shape[0])
    return zip(hidden.split(rows), labels.split(rows), strict=True)


def _cross_entropy(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = project(model, hidden).float()
    return F.cross_entropy(logits, labels, reduction="sum")
