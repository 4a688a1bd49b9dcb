"""Export of the trained model into the run directory."""

from slora_flwr.adapters.model_files import export_classes
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.runs.release import Release
from slora_flwr.server.phase import ActivePhase
from slora_flwr.training.trainer import Trainer


def export(release: Release, trainer: Trainer, phase: ActivePhase) -> None:
    """Write the last state in a format that stock libraries load.

    Raises
    ------
    RunDirectoryError
        If it cannot be written.
    """
    adapter, weights = phase.adapter, phase.weights()
    base = BaseWeights(weights=weights) if weights else phase.base.start
    classes = trainer.data.classes
    with release.export(adapter.folder) as folder:
        adapter.export(folder, phase.state, base, classes, trainer.model.detach)
        export_classes(folder, classes)
