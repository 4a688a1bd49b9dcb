"""Generated responses to test prompts: exact match and ROUGE-L."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from slora_flwr.config import ConfigError, refuse
from slora_flwr.data.dialogues import Dialogue
from slora_flwr.tasks.generation import respond


class ResponseProbe:
    """Compares a model's greedy responses with those of the test data.

    `exact_match` is the share of responses that are the expected ones, blanks aside.
    `rouge_l` is the mean F-measure of the longest common subsequence of words, as the
    package rouge-score has it.

    Parameters
    ----------
    encoder : DialogueEncoder
        What makes tokens of prompts.
    dialogues : Sequence[Dialogue]
        The test dialogues, of which the last response is compared.
    most : int
        The most tokens of a response.
    asked : int
        The run's `run.generate`.

    Raises
    ------
    ConfigError
        If no dialogue has a prompt, or rouge-score is not installed.
    """

    def __init__(
        self, encoder: Any, dialogues: Sequence[Dialogue], most: int, asked: int
    ) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from rouge_score.tokenizers import DefaultTokenizer
        except ImportError as error:
            raise ConfigError(
                f"run.generate is {asked}, and ROUGE-L needs rouge-score, which cannot "
                f"be imported ({error}); allowed: 0, or pip install "
                "'slora-flwr[generate]'"
            ) from error
        self._prompts: list[Dialogue] = []
        self._expected: list[str] = []
        for dialogue in dialogues:
            last = max(i for i, t in enumerate(dialogue) if t["role"] == "assistant")
            if last:
                self._prompts.append(dialogue[:last])
                self._expected.append(dialogue[last]["content"])
        if not self._prompts:
            allowed = "0, since the server has no test data with prompts and responses"
            raise refuse("run.generate", asked, allowed)
        self._encoder, self._most = encoder, most
        # Choosing the tokenizer itself, it would log so, and thereby give the root
        # logger a handler, by which all of the run's lines would appear twice.
        self._scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer())

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the metrics of a model."""
        said = respond(model, self._encoder, self._prompts, self._most)
        pairs = list(zip(self._expected, said, strict=True))
        return {
            "exact_match": fmean(
                right.split() == given.split() for right, given in pairs
            ),
            "rouge_l": fmean(
                self._scorer.score(right, given)["rougeL"].fmeasure
                for right, given in pairs
            ),
        }
