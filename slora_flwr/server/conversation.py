"""A conversation with a finished run's language model."""

import sys
from pathlib import Path
from typing import Any

from slora_flwr.config import refuse
from slora_flwr.data.dialogues import Dialogue, answered, ask, text_of
from slora_flwr.data.texts import Texts
from slora_flwr.server.export import KeptState
from slora_flwr.server.predict import answer_texts
from slora_flwr.tasks.causal_lm import MOST_TOKENS
from slora_flwr.tasks.choice import find_task
from slora_flwr.tasks.generation import longest_prompt


class Conversation:
    """A dialogue that goes on, written by the run's own template.

    Parameters
    ----------
    run, which
        As for `slora_flwr.server.export.export_run`.
    most : int or None
        The most tokens of a response; None for the task's own.

    Raises
    ------
    RunError
        If it is no run directory, or cannot be read.
    ConfigError
        If the run keeps no such state, or its model gives no responses.
    """

    def __init__(self, run: Path, which: str, most: int | None = None) -> None:
        self._most = most or MOST_TOKENS
        self._kept = KeptState.read(run, which)
        task = self._kept.config.task
        if find_task(self._kept.config).has_classes:
            allowed = f"a run of a language model, and this one's task is {task}; "
            raise refuse("RUN", run.name, f"{allowed}slora predict labels texts")
        self.dialogue: Dialogue = []

    def begin(self) -> None:
        """Forget what was said."""
        self.dialogue = []

    def say(self, text: str) -> str:
        """Return the response to a prompt, with all before it in mind.

        What is oldest is forgotten once the dialogue is longer than prompts can be.

        Raises
        ------
        ConfigError
            If the text is not Unicode.
        """
        dialogue = self.dialogue + ask([text])
        encoder: Any = self._kept.data.encoder
        model = self._kept.model.backbone.model
        longest = longest_prompt(model, encoder, self._most)
        while len(dialogue) > 1 and (
            len(encoder.prompt(dialogue, sys.maxsize)) > longest
        ):
            dialogue = dialogue[2:]
        given = Texts([text_of(dialogue)], [""], dialogues=[dialogue])
        [answer] = answer_texts(self._kept, given, self._most)
        response: str = answer.facts["response"]
        self.dialogue = answered(dialogue, response)
        return response
