"""Export of the trained model into the run directory."""

from pathlib import Path

from slora_flwr.adapters.model_files import export_classes
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.common.files import make_folder, make_private
from slora_flwr.runs.directory import writing
from slora_flwr.server.phase import ActivePhase
from slora_flwr.training.trainer import Trainer


def export(directory: Path, trainer: Trainer, phase: ActivePhase) -> None:
    """Write the averaged state in a format that stock libraries load.

    Raises
    ------
    RunDirectoryError
        If it cannot be written.
    """
    adapter = phase.adapter
    folder, classes = directory / adapter.folder, trainer.data.classes
    with writing(directory), phase.on_average() as state:
        weights = phase.weights()
        base = BaseWeights(weights=weights) if weights else phase.base.start
        make_folder(folder)
        adapter.export(folder, state, base, classes, trainer.model.detach)
        export_classes(folder, classes)
        make_private(folder)
