"""The result of a run, and the function that makes one: slora-flwr from Python."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slora_flwr.common.text import counted
from slora_flwr.config import ConfigError
from slora_flwr.config.arguments import flatten_tables, read_file
from slora_flwr.data.paths import make_absolute
from slora_flwr.reports.figures import headline_of
from slora_flwr.runs.events import RecordedRound
from slora_flwr.runs.ledger import Entry
from slora_flwr.runs.reader import RecordedRun, find_run, read_run

if TYPE_CHECKING:
    # Looking at a run must not wait for what takes seconds to import.
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from slora_flwr.common.tensors import State


def train(
    *config: Mapping[str, Any] | str | os.PathLike[str], nodes: int = 1
) -> "Result":
    """Run a method in this process, and return its result.

    Parameters
    ----------
    *config : Mapping or path
        Values of the run config: by flat keys, by tables as in TOML, or in a TOML file.
        Later ones override earlier ones. Paths are relative to the current folder.
    nodes : int
        Number of simulated nodes.

    Raises
    ------
    ConfigError
        If the config cannot be run.
    """
    values: dict[str, Any] = {}
    for given in config:
        if isinstance(given, Mapping):
            flat = flatten_tables(given)
            values |= {
                key: os.fspath(value) if isinstance(value, os.PathLike) else value
                for key, value in flat.items()
            }
        else:
            values |= read_file(Path(given))
    if nodes < 1:
        raise ConfigError(f"nodes is {nodes}; allowed: a number from 1 up")
    from slora_flwr.engines.inline import run_inline

    return Result.of(run_inline(make_absolute(values), nodes)["directory"])


@dataclass(frozen=True, repr=False)
class Result:
    """What has come of a run.

    States are read from the run directory when they are asked for. They are named
    `averaged`, which the run evaluated, `best`, that of the round with the best
    accuracy, and `last`, without the average.

    Attributes
    ----------
    run : RecordedRun
        All that the run directory tells, except states.
    """

    run: RecordedRun

    @classmethod
    def of(cls, run: str | os.PathLike[str] | None = None) -> "Result":
        """Return the result of a run that was made before.

        Parameters
        ----------
        run : str, path or None
            Its directory, or its name or id below `$SLORA_HOME/runs` or the beginning
            of one; None for the newest.

        Raises
        ------
        RunError
            If there is none, or it cannot be read.
        """
        return cls(read_run(find_run(None if run is None else os.fspath(run))))

    def __repr__(self) -> str:
        run, best = self.run, self.best
        told = f"{run.config['method']}, {run.state}, "
        told += counted(len(run.rounds), "round")
        if self.accuracy is not None:
            told += f", accuracy {self.accuracy:.3f}"
        if best is not None:
            told += f", best {best.metrics['accuracy']:.3f} in round {best.round}"
        return f"<Result of {self.directory}: {told}>"

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.run.path

    @property
    def history(self) -> list[RecordedRound]:
        """The rounds, in order."""
        return self.run.rounds

    @property
    def ledger(self) -> list[Entry]:
        """The bytes of each round in each direction."""
        return self.run.ledger

    @property
    def accuracy(self) -> float | None:
        """The accuracy after the last round that was evaluated; None without any."""
        return self.run.accuracy

    @property
    def best(self) -> RecordedRound | None:
        """The round with the best accuracy, or perplexity; None without evaluations."""
        finite = [done for done in self.run.evaluated if "loss" in done.metrics]
        return headline_of(finite).best(finite)

    def state(self, which: str = "averaged") -> "State":
        """Return the tensors that clients trained, by name.

        Parameters
        ----------
        which : str
            `averaged`, `best` or `last`.

        Raises
        ------
        ConfigError
            If the run keeps no such state.
        """
        from slora_flwr.server.export import read_state

        return read_state(self.directory, which)

    def model(self, which: str = "averaged") -> "PreTrainedModel":
        """Return a model of transformers with the state merged into its weights.

        It is ready for inference, in float32, and independent of slora-flwr: it can be
        saved, or given to a pipeline with `tokenizer()` and `truncation=True`, which
        cuts texts where training did.

        Parameters
        ----------
        which : str
            `averaged`, `best` or `last`.

        Raises
        ------
        ConfigError
            If the run keeps no such state, or no model of transformers computes what
            its method's does: bottlenecks cannot be merged. `predict` works then too.
        """
        import transformers

        from slora_flwr.config import parse
        from slora_flwr.tasks.choice import find_task

        auto = getattr(transformers, find_task(parse(self.run.config)).auto_class)
        with tempfile.TemporaryDirectory() as folder:
            self.export(folder, which, merge=True)
            model: PreTrainedModel = auto.from_pretrained(
                folder, trust_remote_code=False
            )
        return model

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the tokenizer of the model."""
        from transformers import AutoTokenizer

        from slora_flwr.server.export import own_export

        tokenizer: Any = AutoTokenizer.from_pretrained(
            own_export(self.directory), trust_remote_code=False
        )
        return cast("PreTrainedTokenizerFast", tokenizer)

    def predict(self, texts: str | Iterable[str], which: str = "averaged") -> list[Any]:
        """Return the labels, or the responses, that the model gives to texts.

        The model is loaded for each call, so pass texts together.

        Parameters
        ----------
        texts : str or Iterable[str]
            A text or several.
        which : str
            `averaged`, `best` or `last`.

        Raises
        ------
        ConfigError
            If the run keeps no such state.
        """
        from slora_flwr.server.predict import predict_texts

        given = [texts] if isinstance(texts, str) else list(texts)
        return predict_texts(self.directory, which, given)

    def export(
        self,
        to: str | os.PathLike[str],
        which: str = "averaged",
        *,
        merge: bool = False,
    ) -> Path:
        """Write a state for stock libraries to load, and return the folder.

        Parameters
        ----------
        to : str or path
            The folder, new or empty.
        which : str
            `averaged`, `best` or `last`.
        merge : bool
            Write a whole model instead of an adapter.

        Raises
        ------
        ConfigError
            If the run keeps no such state, there is nothing such to export, or nowhere
            to write it.
        """
        from slora_flwr.server.export import export_run

        return export_run(self.directory, which, merge, Path(to))

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the accuracy, or perplexity, by round, and return matplotlib's axes.

        Parameters
        ----------
        axes : matplotlib.axes.Axes or None
            Where to draw; None for a new figure.

        Raises
        ------
        ConfigError
            If no round was evaluated.
        """
        from slora_flwr.reports.run_page import accuracy_charts

        if not self.run.evaluated:
            raise ConfigError(
                f"{self.directory} has no evaluated round; allowed: a run that has"
            )
        if axes is None:
            from matplotlib import pyplot

            _, axes = pyplot.subplots()
        accuracy_charts(self.run)[0].draw(axes)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend()
        return axes
