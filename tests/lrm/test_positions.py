"""The start of position tables."""

from __future__ import annotations

import pytest
import torch

from lrm.positions import fourier_grid


@pytest.mark.parametrize(("side", "width"), [(8, 96), (32, 1024), (4, 30), (3, 4)])
def test_places_are_told_apart_and_near_ones_are_alike(side: int, width: int) -> None:
    table = fourier_grid(side, width)
    assert table.shape == (side * side, width)
    assert len(torch.unique(table.round(decimals=4), dim=0)) == side * side
    likeness = table @ table[0]
    assert likeness.argmax() == 0
    assert likeness[1] > likeness[side - 1]  # the next column, the farthest column
    torch.testing.assert_close(likeness, table.unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1) @ table[0])
