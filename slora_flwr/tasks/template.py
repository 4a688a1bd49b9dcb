"""What is written around prompts and responses, and their tokens."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slora_flwr.common.text import printable
from slora_flwr.config import ConfigError
from slora_flwr.data.dialogues import Dialogue, Message, content_of
from slora_flwr.data.texts import Texts
from slora_flwr.data.tokens import in_one_array

# Stanford Alpaca's, https://github.com/tatsu-lab/stanford_alpaca (Apache-2.0).
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{prompt}\n\n"
    "{given}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Tokens:
    """One example's tokens, and which of them the model learns to give."""

    ids: list[int]
    learned: list[bool]
    cut: bool


class Template:
    """The text around prompts and responses; the same wherever a model is used.

    Parameters
    ----------
    name : str
        `chat`, the tokenizer's own; `alpaca`; `plain`, which is a line end; or `auto`,
        `chat` if the tokenizer has one and else `plain`.
    tokenizer : transformers.PreTrainedTokenizerFast
        The model's.

    Raises
    ------
    ConfigError
        If the tokenizer has no chat template or no end token.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        has_own = bool(getattr(tokenizer, "chat_template", None))
        if name == "auto":
            name = "chat" if has_own else "plain"
        if name == "chat" and not has_own:
            raise ConfigError(
                "data.template is 'chat', and the model's tokenizer has no chat "
                "template; allowed: alpaca, plain"
            )
        if tokenizer.eos_token is None:
            raise ConfigError(
                "the model's tokenizer has no end token, so responses could not end; "
                "allowed: a language model whose tokenizer has one, such as "
                "embedded-llama"
            )
        self.name = name
        self._tokenizer = tokenizer

    @property
    def description(self) -> str:
        """All that the tokens depend on besides the text and the tokenizer's model."""
        own = self._tokenizer.chat_template if self.name == "chat" else ""
        return f"{self.name}\x1f{own}\x1f{self._tokenizer.eos_token}"

    def prompt(self, dialogue: Dialogue) -> str:
        """Return the text after which the model is to respond."""
        if self.name == "chat":
            return self._chat(dialogue, True)
        return self._start() + "".join(map(self._turn, dialogue))

    def pieces(self, dialogue: Dialogue) -> list[tuple[str, bool]]:
        """Return the text in pieces, each with whether it is a response.

        Raises
        ------
        ConfigError
            If a chat template writes what came before a response otherwise than it
            wrote it when the response was due: the model would be asked what it did
            not learn.
        """
        if len(dialogue) == 1:  # a text that is learned itself
            return [
                (self._start(), False),
                (dialogue[0]["content"] + self._tokenizer.eos_token, True),
            ]
        answers = [i for i, turn in enumerate(dialogue) if turn["role"] == "assistant"]
        pieces: list[tuple[str, bool]] = []
        done = ""
        for at in answers:
            before = self.prompt(dialogue[:at])
            after = self._until_end(self._closed(dialogue[: at + 1]))
            for earlier, later in ((done, before), (before, after)):
                if not later.startswith(earlier):
                    raise ConfigError(
                        "data.template is 'chat', and the tokenizer's template changes "
                        f"what precedes a response: {printable(earlier[-60:])!r}; "
                        "allowed: alpaca, plain, or dialogues of one response"
                    )
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return pieces

    def _closed(self, dialogue: Dialogue) -> str:
        """Return the text up to the end of the last message, a response."""
        if self.name == "chat":
            return self._chat(dialogue, False)
        response = dialogue[-1]["content"] + self._tokenizer.eos_token
        return self.prompt(dialogue[:-1]) + response

    def _until_end(self, text: str) -> str:
        """Return a text without the blanks after its end token.

        Chat templates write line ends there, which the model is never asked for.
        """
        ended = text.rstrip()
        is_ended = ended.endswith(tuple(self._tokenizer.all_special_tokens))
        return ended if is_ended else text

    def _chat(self, dialogue: Dialogue, is_due: bool) -> str:
        turns = [{"role": t["role"], "content": content_of(t)} for t in dialogue]
        text: str = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=is_due
        )
        return text

    def _start(self) -> str:
        return self._tokenizer.bos_token if self._begins() else ""

    def _begins(self) -> bool:
        """Return whether the tokenizer itself begins texts with its start token."""
        ids = self._tokenizer("a")["input_ids"]
        return bool(ids) and ids[0] == self._tokenizer.bos_token_id

    def _turn(self, turn: Message) -> str:
        if turn["role"] == "assistant":
            return turn["content"] + self._tokenizer.eos_token
        if turn["role"] == "system":  # before the first instruction
            return turn["content"] + ("\n" if self.name == "plain" else "\n\n")
        if self.name == "plain":
            return content_of(turn) + "\n"
        given = turn.get("input", "")
        return _ALPACA.format(
            paired=_PAIRED if given else "",
            prompt=turn["content"],
            given=f"### Input:\n{given}\n\n" if given else "",
        )


def encode(
    pieces: Iterable[tuple[str, bool]], tokenizer: Any, max_length: int
) -> Tokens:
    """Return the tokens of pieces of text, at most `max_length`.

    What is too long loses tokens, but never the whole of a response: first the middle
    of what comes before the last response, down to half of the length, then the
    response's end.

    Parameters
    ----------
    pieces : Iterable[tuple[str, bool]]
        The text in order, each piece with whether the model learns to give it.
    tokenizer : transformers.PreTrainedTokenizerFast
        The model's.
    max_length : int
        The most tokens.
    """
    ids: list[int] = []
    learned: list[bool] = []
    for text, is_response in pieces:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        learned += [is_response] * len(found)
    if learned:
        learned[0] = False  # nothing comes before it
    over = len(ids) - max_length
    if over <= 0 or True not in learned:
        return Tokens(ids[:max_length], learned[:max_length], cut=over > 0)
    # The tokens before the last response, and those of it.
    last = len(learned) - learned[::-1].index(True)
    first = last
    while first and learned[first - 1]:
        first -= 1
    kept = min(first, max(max_length - (len(ids) - first), max_length // 2))
    head, tail = kept - kept // 2, kept // 2
    cut = slice(head, first - tail)
    del ids[cut], learned[cut]
    return Tokens(ids[:max_length], learned[:max_length], cut=True)


@dataclass(frozen=True)
class DialogueEncoder:
    """Makes tokens of dialogues, and says which of them are learned."""

    tokenizer: Any
    max_length: int
    template: Template

    @property
    def pad(self) -> int:
        """The padding token."""
        return int(self.tokenizer.pad_token_id)

    @property
    def description(self) -> str:
        """All that the tokens depend on besides the texts."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        own = f"{self.max_length}\x1f{self.template.description}"
        return f"{own}\x1f{backend.to_str()}"

    def prompt(self, dialogue: Dialogue, longest: int) -> list[int]:
        """Return the tokens after which the model is to respond.

        The middle of a prompt of more than `longest` tokens is left out, as in
        training.
        """
        text = self.template.prompt(dialogue)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > longest:
            tail = longest // 2
            ids = ids[: longest - tail] + ids[len(ids) - tail :]
        return ids

    def encode(self, texts: Texts) -> dict[str, NDArray[Any]]:
        """Return the dialogues' tokens, and which of them are learned."""
        found = [
            encode(self.template.pieces(dialogue), self.tokenizer, self.max_length)
            for dialogue in texts.dialogues
        ]
        if cut := sum(tokens.cut for tokens in found):
            told = "data.max-length is %d: %d of %d examples are cut"
            log = logging.getLogger(__name__).warning
            log(told, self.max_length, cut, len(found))
        learned = np.array([x for tokens in found for x in tokens.learned], dtype=bool)
        return in_one_array(tokens.ids for tokens in found) | {"learned": learned}
