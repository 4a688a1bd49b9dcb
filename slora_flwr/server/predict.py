"""Labels that a finished run's model gives to texts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slora_flwr.common.files import expand
from slora_flwr.common.text import is_unicode
from slora_flwr.config import refuse
from slora_flwr.data.texts import read_unlabelled, tokenise_unlabelled
from slora_flwr.server.export import KeptState
from slora_flwr.training.loop import predict


@dataclass(frozen=True)
class Prediction:
    """A text, its most probable label, and the probability of each label."""

    text: str
    label: str
    probabilities: dict[str, float]


def predict_texts(
    run: Path, which: str, texts: list[str], file: Path | None = None
) -> Iterator[Prediction]:
    """Yield the predictions of a run's state.

    Parameters
    ----------
    run, which
        As for `slora_flwr.server.export.export_run`.
    texts : list[str]
        The texts.
    file : Path or None
        A file of further texts: a line each in a `.txt` file, else in the columns in
        which the run's data has its text.

    Raises
    ------
    RunError
        If it is no run directory, or cannot be read.
    ConfigError
        If the run keeps no such state, the file cannot be read, or a text is not
        Unicode.
    """
    kept = KeptState.read(run, which)
    config, model = kept.config, kept.model
    if file is not None:
        texts = [*texts, *read_unlabelled(config.data, expand(file))]
    for text in texts:
        if not is_unicode(text):
            raise refuse("text", text, "characters that UTF-8 has")
    model.adapter.load(kept.state)
    examples = tokenise_unlabelled(config.data, model.backbone.tokenizer, texts)
    found = predict(model.backbone, examples, config.train.precision)
    for text, row in zip(texts, found, strict=True):
        probabilities = dict(zip(kept.classes, map(float, row), strict=True))
        label = kept.classes[int(row.argmax())]
        yield Prediction(text, label, probabilities)
