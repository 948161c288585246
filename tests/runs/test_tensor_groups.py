"""Tensors whose pieces are in several files are read whole, or by any elements."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignlab.models.pieces import Piece
from alignlab.runs.tensor_groups import elements_of, load_held, read_groups, shape_of, write_part


@pytest.fixture
def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 3, generator=generator), "single": torch.randn(1, generator=generator),
        "step": torch.tensor(4.0), "whole": torch.arange(4),
    }


@pytest.fixture(params=[[0, 21], [0, 12, 21], [0, 8, 16, 21], [0, 0, 4, 4, 20, 21]], ids=str)
def folder(request: pytest.FixtureRequest, whole: dict[str, Tensor], tmp_path: Path) -> Path:
    """Elements of `matrix` and `single` in parts cut at these places, some within a row; the others in the first."""
    cuts = request.param
    for rank, (start, stop) in enumerate(itertools.pairwise(cuts)):
        pieces = {
            name: Piece(whole[name].view(-1)[start:stop], min(start, whole[name].numel()), whole[name].shape)
            for name in ("matrix", "single")
        }
        write_part(tmp_path, "policy", rank, whole | pieces)
    return tmp_path


def test_parts_are_joined(folder: Path, whole: dict[str, Tensor]) -> None:
    [group] = read_groups(folder, [path.name for path in folder.iterdir()]).values()
    assert set(group) == set(whole)
    for name, tensor in whole.items():
        assert shape_of(group, name) == tensor.shape
        assert group[name].dtype == tensor.dtype
        assert torch.equal(group[name], tensor), name


def test_any_elements_are_read(folder: Path, whole: dict[str, Tensor]) -> None:
    group = read_groups(folder, [path.name for path in folder.iterdir()])["policy"]
    flat = whole["matrix"].view(-1)
    for start in range(22):
        for stop in range(start, 22):
            assert torch.equal(group.elements("matrix", start, stop), flat[start:stop])
    piece = Piece(torch.zeros(5), 6, torch.Size([7, 3]))
    for source in (group, whole):
        assert torch.equal(elements_of(source, "matrix", piece), flat[6:11])


def test_elements_of_a_file_of_whole_tensors_are_read(whole: dict[str, Tensor], tmp_path: Path) -> None:
    write_part(tmp_path, "policy", 0, whole)
    group = read_groups(tmp_path, [path.name for path in tmp_path.iterdir()])["policy"]
    assert torch.equal(group.elements("matrix", 5, 17), whole["matrix"].view(-1)[5:17])


def test_a_tensor_is_loaded_into_another(folder: Path, whole: dict[str, Tensor]) -> None:
    group = read_groups(folder, [path.name for path in folder.iterdir()])["policy"]
    for name, tensor in whole.items():
        for source in (group, whole):
            target = torch.zeros_like(tensor)
            load_held(source, name, target)
            assert torch.equal(target, tensor)
