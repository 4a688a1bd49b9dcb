"""The learning rate's course reaches the clients."""

import torch

from slora_flwr.common.tensors import State
from slora_flwr.runs.checkpoint import read_checkpoint
from slora_flwr.runs.checkpoint_files import list_checkpoints
from tests.support.grids import RecordingGrid
from tests.support.runs import Config, elsewhere, start


def states(config: Config) -> list[State]:
    directory = start(config, RecordingGrid(config))
    saved = [read_checkpoint(path) for path in list_checkpoints(directory)]
    return [checkpoint.part("phase").part("state").tensors for checkpoint in saved]


def test_the_second_of_two_linear_rounds_has_half_the_rate(config: Config) -> None:
    """With one step of SGD per client, an update is proportional to the rate."""
    config |= {"train.optimizer": "sgd", "train.batch-size": 160, "train.lr": 0.5}
    config |= {"rounds": 2, "run.keep": 2}
    whole = states(config)
    config = elsewhere(config, **{"train.schedule": "linear"})
    decayed = states(config)
    for name, first in whole[0].items():
        assert torch.equal(decayed[0][name], first)
        expected = (whole[1][name] - first) / 2
        torch.testing.assert_close(
            decayed[1][name] - first, expected, rtol=1e-3, atol=1e-7
        )
    assert any(bool((whole[1][n] != whole[0][n]).any()) for n in whole[0])
