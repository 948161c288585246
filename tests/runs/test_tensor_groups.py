"""Tensors whose rows are in several files are read whole, or by any rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignlab.runs import tensor_groups
from alignlab.runs.tensor_groups import load_rows, read_groups, shape_of, write_part


@pytest.fixture
def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 3, generator=generator), "single": torch.randn(1, generator=generator),
        "step": torch.tensor(4.0), "whole": torch.arange(4),
    }


@pytest.fixture(params=[1, 2, 3, 8])
def folder(
    request: pytest.FixtureRequest, whole: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The rows of `matrix` and `single` in as many parts; the others in the first."""
    count = request.param

    class Spread(Tensor):
        """A tensor of which a rank holds some rows."""

    for rank in range(count):
        def rows_of(tensor: Tensor, rank: int = rank) -> tuple[Tensor, int]:
            part = -(-len(tensor) // count)
            start = min(rank * part, len(tensor))
            return tensor.as_subclass(Tensor)[start : start + part], start

        monkeypatch.setattr(tensor_groups, "DTensor", Spread)
        monkeypatch.setattr(tensor_groups, "rows_of", rows_of)
        spread = {name: whole[name].as_subclass(Spread) for name in ("matrix", "single")}
        write_part(tmp_path, "policy", rank, whole | spread)
    monkeypatch.undo()
    return tmp_path


def test_parts_are_joined(folder: Path, whole: dict[str, Tensor]) -> None:
    [group] = read_groups(folder, [path.name for path in folder.iterdir()]).values()
    assert set(group) == set(whole)
    for name, tensor in whole.items():
        assert shape_of(group, name) == tensor.shape
        assert torch.equal(group[name], tensor), name


def test_any_rows_are_read(folder: Path, whole: dict[str, Tensor]) -> None:
    group = read_groups(folder, [path.name for path in folder.iterdir()])["policy"]
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(group.rows("matrix", start, stop), whole["matrix"][start:stop])


def test_a_tensor_is_loaded_into_another(folder: Path, whole: dict[str, Tensor]) -> None:
    group = read_groups(folder, [path.name for path in folder.iterdir()])["policy"]
    for name, tensor in whole.items():
        for source in (group, whole):
            target = torch.zeros_like(tensor)
            load_rows(source, name, target)
            assert torch.equal(target, tensor)
