"""The grid on which updates are summed."""

import numpy as np
import pytest
import torch

from slora_flwr.wire.grid import Grid


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_values_beyond_the_grid_become_its_ends(size: float) -> None:
    grid = Grid(64, bound=1.0, levels=127, seed=3)
    update = torch.randn(64, generator=torch.Generator().manual_seed(0))
    update /= update.norm()
    within = grid.codes(grid.encode({"x": update}))
    assert 0 < np.abs(within).max() < 127
    beyond = grid.codes(grid.encode({"x": size * update}))
    np.testing.assert_array_equal(
        beyond[within != 0], 127 * np.sign(within[within != 0])
    )
