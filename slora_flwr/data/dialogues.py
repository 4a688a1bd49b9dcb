"""Dialogues: prompts and the responses that a language model learns."""

from collections.abc import Sequence

import numpy as np

from slora_flwr.common.text import printable

# A message, as chat templates have it; an instruction's input may be told apart.
Message = dict[str, str]
# The responses are the messages of the role `assistant`.
Dialogue = list[Message]

ROLES = ("system", "user", "assistant")


def content_of(turn: Message) -> str:
    """Return a message's text, with an instruction's input."""
    return "\n".join(filter(None, (turn["content"], turn.get("input", ""))))


def ask(prompts: Sequence[str]) -> Dialogue:
    """Return a dialogue that ends with a prompt: an instruction, and its input."""
    first, *others = prompts
    given = "\n".join(filter(None, others))
    return [{"role": "user", "content": first} | ({"input": given} if given else {})]


def answered(dialogue: Dialogue, response: str) -> Dialogue:
    """Return a dialogue with a response at its end."""
    return [*dialogue, {"role": "assistant", "content": response}]


def read_messages(given: object, *, is_prompt: bool = False) -> Dialogue:
    """Return the dialogue in a value of a column of messages.

    Parameters
    ----------
    given : object
        The value.
    is_prompt : bool
        Whether a response is due: it may lack one, and one at its end is left out.

    Raises
    ------
    ValueError
        If it is none, or has no response.
    """
    if not isinstance(given, list | tuple | np.ndarray):
        raise ValueError(f"it is {printable(given)!r:.60}, not a list of messages")
    dialogue = []
    for turn in given:
        role, content = (
            (turn.get("role"), turn.get("content"))
            if isinstance(turn, dict)
            else (None, None)
        )
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"a message is {printable(turn)!r:.60}; allowed: a role, one of "
                f"{', '.join(ROLES)}, and a content that is text"
            )
        dialogue.append({"role": role, "content": content})
    if is_prompt:
        while dialogue and dialogue[-1]["role"] == "assistant":
            dialogue.pop()
        if not dialogue:
            raise ValueError("it has no message to respond to")
    elif not any(turn["role"] == "assistant" for turn in dialogue):
        raise ValueError("no message has the role assistant")
    return dialogue


def text_of(dialogue: Dialogue) -> str:
    """Return all of a dialogue's text, by which it is known."""
    return "\n".join(map(content_of, dialogue))
