"""Exports of a run's states, with labels, tokeniser and model card."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from slora_flwr.adapters.loading import Loading
from slora_flwr.adapters.model_files import (
    export_classes,
    export_tokenizer,
    read_classes,
)
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone, public_name
from slora_flwr.common.tensors import State
from slora_flwr.common.text import printable
from slora_flwr.config import ConfigError, RunConfig, parse, refuse
from slora_flwr.config.schedule import Phase, make_schedule
from slora_flwr.reports.model_card import ModelCard
from slora_flwr.runs.events import METRICS
from slora_flwr.runs.reader import RecordedRun, RunError, read_run
from slora_flwr.runs.release import Release
from slora_flwr.server.phase import ActivePhase
from slora_flwr.tasks.choice import find_task
from slora_flwr.training.attached_model import AttachedModel
from slora_flwr.training.process_data import ProcessData
from slora_flwr.training.trainer import Trainer

_TOKENIZER_FILE = "tokenizer.json"
T = TypeVar("T")

# The states of a run that can be exported, and where their bases are if they have any.
BASES = {
    "last": ("base",),
    "averaged": ("averaged-base", "base"),
    "best": ("best-base",),
}


def export(
    release: Release, trainer: Trainer, phase: ActivePhase, summary: dict[str, Any]
) -> None:
    """Write the averaged state into the run directory.

    Stock libraries load it as the function that the run evaluated, or refuse to.

    Raises
    ------
    RunDirectoryError
        If it cannot be written.
    """
    adapter, model = phase.adapter, trainer.model
    classes = trainer.data.classes
    with release.export(adapter.folder) as folder, phase.on_average() as state:
        weights = phase.weights()
        base = BaseWeights(weights=weights) if weights else phase.base.start
        loading = adapter.export(folder, state, base, classes, model.detach)
        which = "averaged" if phase.is_averaged else "last"
        sizes = [summary[f"payload_bytes_{direction}"] for direction in ("down", "up")]
        privacy, tested = summary.get("privacy", {}), len(trainer.data.tokenised.test)
        rounds = summary["rounds"]
        found = _Exported(which, rounds, loading, summary, sizes, privacy, tested)
        _complete(folder, trainer.config, trainer.data, model, classes, found)


def export_run(run: Path, which: str, merge: bool, to: Path, repo: str = "") -> Path:
    """Export a state of a finished run.

    Parameters
    ----------
    run : Path
        The run directory.
    which : str
        `last`, `averaged` or `best`. Where a phase keeps no average, `averaged` is the
        last state.
    merge : bool
        Write a whole model, which stock transformers loads.
    to : Path
        The folder to write, new or empty.
    repo : str
        The repository of the Hub that it is for; empty if for none.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    RunError
        If it is no run directory, or cannot be read.
    ConfigError
        If there is nothing such to export, or nowhere to write it.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"to is {str(to)!r}; allowed: a new or empty folder")
    kept = KeptState.read(run, which)
    if not all(bool(tensor.isfinite().all()) for tensor in kept.state.values()):
        raise ConfigError(
            f"the {kept.which} state of {run} has numbers that are not finite; "
            "allowed: one whose numbers all are"
        )
    adapter, model = kept.model.adapter, kept.model
    write = adapter.merge if merge else adapter.export
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = f"a folder that can be made and written ({error.strerror})"
        raise refuse("to", str(to), allowed) from error
    try:
        loading = write(to, kept.state, kept.base, kept.classes, model.detach)
        found = _Exported(
            kept.which,
            kept.number,
            loading,
            kept.figures,
            kept.payload,
            kept.privacy,
            kept.test_examples,
            repo,
        )
        _complete(to, kept.config, kept.data, model, kept.classes, found)
    except BaseException:  # Nobody is to take half an export for a whole one.
        shutil.rmtree(to, ignore_errors=True)
        raise
    return to


@dataclass(frozen=True)
class KeptState:
    """A state that a finished run keeps, and the model that it belongs to.

    Attributes
    ----------
    which : str
        `last`, `averaged` or `best`.
    number : int
        The round that it is of.
    state : State
        The state.
    model : AttachedModel
        The run's model with the adapter of the state's phase attached over `base`. The
        state is not loaded.
    data : ProcessData
        What makes tokens as the run did.
    base : BaseWeights or None
        The base; None for W_0.
    config, classes
        The run's config and label names.
    figures : Mapping
        The state's figures on the test data; empty if its round has none.
    payload, privacy, test_examples
        As in `ModelCard`.
    """

    which: str
    number: int
    state: State
    model: AttachedModel
    data: ProcessData
    base: BaseWeights | None
    config: RunConfig
    classes: list[str]
    figures: Mapping[str, Any]
    payload: Sequence[int]
    privacy: Mapping[str, Any]
    test_examples: int

    @classmethod
    def read(cls, run: Path, which: str) -> "KeptState":
        """Return a state of the run in a directory; see `export_run`."""
        recorded = read_run(run)
        config = parse(recorded.config)
        if recorded.summary is None:
            raise ConfigError(
                f"{run} is of a run that has not ended; allowed: one that has"
            )
        which = _kept(run, which)
        facts = _read(_state_file(run, which), _state_facts)
        schedule, number = make_schedule(config), int(facts["round"])
        names = [phase.adapter for phase in schedule]
        # The phases' lengths are counted by the events.
        if (
            recorded.damage
            or len(recorded.rounds) < number
            or facts["phase"] not in names
        ):
            why = recorded.damage or "its config and events are not those of its states"
            raise RunError(f"{run} cannot be read: {why}")
        phase = schedule[names.index(facts["phase"])]
        earlier = names[: names.index(phase.adapter)]
        before = sum(len(recorded.phases[name]) for name in earlier)
        classes = _read(own_export(run), read_classes)
        data = ProcessData(config, classes)
        model = AttachedModel(config, data)
        _check_digest(config, recorded, model.backbone.digest)
        base = _read_base(
            run, which, facts["base"], config, phase, model.backbone, before
        )
        model.attach(phase, base, facts["base"]).begin(number - before)
        state = _read(_state_file(run, which), load_file)
        return cls(
            which,
            number,
            state,
            model,
            data,
            base,
            config,
            classes,
            _figures(recorded, phase, which, number),
            [recorded.total("payload", direction) or 0 for direction in ("down", "up")],
            recorded.facts["resolved"].get("privacy", {}),
            recorded.facts["resolved"].get("test_examples", 0),
        )


@dataclass(frozen=True)
class _Exported:
    """What a model card tells besides the config; see `ModelCard`."""

    which: str
    number: int
    loading: Loading
    figures: Mapping[str, Any]
    payload: Sequence[int]
    privacy: Mapping[str, Any]
    test_examples: int
    repo: str = ""


def _complete(
    folder: Path,
    config: RunConfig,
    data: ProcessData,
    model: AttachedModel,
    classes: list[str],
    found: _Exported,
) -> None:
    """Add to an export what is not the adapter's: labels, tokeniser, model card."""
    if classes:
        export_classes(folder, classes)
    task = find_task(config)
    usage = task.usage(data.encoder)
    length = task.longest_text(config.data)
    export_tokenizer(folder, model.backbone.tokenizer, length)
    card = ModelCard(
        config=config,
        base=public_name(config.model.name),
        digest=model.backbone.digest,
        quantization=model.backbone.quantization,
        task=find_task(config),
        usage=usage,
        classes=len(classes),
        **vars(found),
    )
    (folder / "README.md").write_text(card.text, encoding="utf-8")


def read_state(run: Path, which: str) -> State:
    """Return a state of a run; see `export_run`."""
    return _read(_state_file(run, _kept(run, which)), load_file)


def own_export(run: Path) -> Path:
    """Return the folder of the export that a run writes as it ends.

    Raises
    ------
    ConfigError
        If there is none.
    """
    for path in sorted(run.glob(f"*/{_TOKENIZER_FILE}")):
        return path.parent
    raise ConfigError(
        f"{run} holds no {_TOKENIZER_FILE}, which a run writes with its export as it "
        "ends; allowed: a run that has it"
    )


def _kept(run: Path, which: str) -> str:
    """Return the state that is meant, or raise ConfigError if it is not kept."""
    if which not in BASES:
        raise ConfigError(f"which is {which!r}; allowed: {', '.join(BASES)}")
    for kept in ("averaged", "last") if which == "averaged" else (which,):
        if _state_file(run, kept).is_file():
            return kept
    raise ConfigError(
        f"{run} keeps no {which} state; allowed: a run that does, such as one that was "
        "evaluated, for the best, or of a sweep with --keep-states"
    )


def _state_file(run: Path, name: str) -> Path:
    return run / "checkpoints" / f"{name}.safetensors"


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """Return what a run's file holds, or raise RunError if it is damaged."""
    try:
        return read(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {printable(error)}") from error


def _state_facts(path: Path) -> dict[str, str]:
    return _facts(path, "round", "phase", "base")


def _base_facts(path: Path) -> dict[str, str]:
    return _facts(path, "digest")


def _facts(path: Path, *names: str) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
    for name in names:
        if name not in found:
            raise ValueError(f"it has no {name}")
    return dict(found)


def _check_digest(config: RunConfig, recorded: RecordedRun, digest: str) -> None:
    """Raise ConfigError if the checkpoint is no longer that of the run."""
    expected = recorded.facts["resolved"].get("backbone_digest", digest)
    if digest != expected:
        raise ConfigError(
            f"model.name is {config.model.name!r}, whose weights have the digest "
            f"{digest}; allowed: those of the run, {expected}"
        )


def _read_base(
    run: Path,
    which: str,
    digest: str,
    config: RunConfig,
    phase: Phase,
    backbone: Backbone,
    before: int,
) -> BaseWeights | None:
    """Return the base of a state; None for W_0. `before` is the rounds of the past."""
    paths = (_state_file(run, name) for name in BASES[which])
    path = next((path for path in paths if path.is_file()), None)
    if digest != ("" if path is None else _read(path, _base_facts)["digest"]):
        raise ConfigError(
            f"{run} does not keep the base of its {which} state; allowed: a run that "
            "does"
        )
    if path is None:
        return None
    state = _read(path, load_file)
    if phase.changes_base:
        return BaseWeights(weights=state)
    layout = phase.adapter_type.base_layout(phase, config, backbone, before)
    _, positions, scaling = layout
    return BaseWeights.from_state(state, positions, scaling)


def _figures(
    recorded: RecordedRun, phase: Phase, which: str, number: int
) -> dict[str, float | None]:
    """Return the figures of a state that its round has; empty if it has none."""
    metrics = next((d.metrics for d in recorded.rounds if d.round == number), {})
    prefix = "plain_" if which == "last" and phase.average != "none" else ""
    # As in summary.json, None if it is not finite.
    found = {
        name: metrics[f"{prefix}{name}"]
        for name in METRICS
        if f"{prefix}{name}" in metrics
    }
    return {} if "accuracy" not in found else {"loss": None} | found
