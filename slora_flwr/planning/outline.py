"""A run's backbone from config.json alone, for plans."""

from collections.abc import Sequence

from slora_flwr.backbone.families import expert_weights
from slora_flwr.backbone.load import Backbone, outline_backbone
from slora_flwr.config import ConfigError, RunConfig
from slora_flwr.tasks.choice import find_task
from slora_flwr.training.attached_model import check_fit
from slora_flwr.training.process_data import ProcessData


def outline(config: RunConfig, classes: Sequence[str] = ()) -> Backbone:
    """Return the backbone of a run without its weights, which are not looked for.

    Parameters
    ----------
    config : RunConfig
        The run.
    classes : Sequence[str]
        As in `ProcessData`.

    Raises
    ------
    ConfigError
        If there is no such model, the run does not fit it, or it is a mixture of
        experts.
    """
    data, task = ProcessData(config, classes), find_task(config)
    backbone = outline_backbone(
        config.model,
        task.outputs(data.classes),
        config.lora.targets,
        data.tokenizer,
        task,
    )
    if experts := expert_weights(backbone.model):
        raise ConfigError(
            f"model.name is {config.model.name!r}, a mixture of experts "
            f"({next(iter(experts))}): what it keeps depends on the values that choose "
            "an expert; allowed without weights: any other model"
        )
    check_fit(config, backbone)
    return backbone
