"""Export of the trained model into the run directory."""

from slora_flwr.adapters.model_files import export_classes
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.runs.release import Release
from slora_flwr.server.phase import ActivePhase
from slora_flwr.training.trainer import Trainer


def export(release: Release, trainer: Trainer, phase: ActivePhase) -> None:
    """Write the averaged state in a format that stock libraries load.

    Raises
    ------
    RunDirectoryError
        If it cannot be written.
    """
    adapter, classes = phase.adapter, trainer.data.classes
    with release.export(adapter.folder) as folder, phase.on_average() as state:
        weights = phase.weights()
        base = BaseWeights(weights=weights) if weights else phase.base.start
        adapter.export(folder, state, base, classes, trainer.model.detach)
        export_classes(folder, classes)
