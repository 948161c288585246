"""Named tensors in one file, or in several of which each holds a piece of each tensor.

    policy.safetensors                                       every tensor, whole
    policy-part-00000.safetensors, policy-part-00001...      pieces, each [n], from ranks that hold no more

A part names in its header where each piece belongs; the reader joins the pieces, or reads the elements that it needs,
by how many ranks and under which strategy ever they were written.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from alignlab.files.tensor_files import write_tensors
from alignlab.models.pieces import Held, Piece, held, is_gathered, mark_written, piece_of, whole_shape

_PART = re.compile(r"(.+)-part-\d{5}")
_PIECES = "pieces"


class _Place(NamedTuple):
    """Elements `start` to `stop` of a tensor; `is_whole`: in the tensor's own shape, and not in one dimension."""

    path: Path
    start: int
    stop: int
    is_whole: bool


class TensorGroup(Mapping[str, Tensor]):
    """Tensors of one name in a folder, read when they are asked for.

    Args:
        paths: the files, which are read and not verified.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places: dict[str, list[_Place]] = defaultdict(list)
        self._shapes: dict[str, torch.Size] = {}
        for path in paths:
            self._add(path)
        for places in self._places.values():
            places.sort(key=lambda place: (place.start, place.stop))

    def _add(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            pieces = json.loads((file.metadata() or {}).get(_PIECES, "{}"))
            for name in file.keys():  # noqa: SIM118  # a file is no mapping
                stored = torch.Size(file.get_slice(name).get_shape())
                start, shape = pieces.get(name, (0, stored))
                self._shapes[name] = torch.Size(shape)
                self._places[name].append(_Place(path, start, start + stored.numel(), name not in pieces))

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a whole tensor."""
        return self._shapes[name]

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start` to `stop` of a tensor in its flat order, from the files that hold some of them."""
        places = self._places[name]
        overlapping = [place for place in places if place.start < stop and start < place.stop]
        return torch.cat([
            _read(place, name, max(start - place.start, 0), min(stop, place.stop) - place.start)
            for place in overlapping or places[:1]  # nothing to read is of a dtype too
        ])

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return self.elements(name, 0, shape.numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _read(place: _Place, name: str, first: int, last: int) -> Tensor:
    """Return elements `first` to `last` of what a file holds of a tensor."""
    with safe_open(place.path, "pt") as file:
        found: Tensor = file.get_tensor(name).view(-1) if place.is_whole else file.get_slice(name)
        return found[first : max(first, last)]


def read_groups(folder: Path, file_names: Sequence[str]) -> dict[str, TensorGroup]:
    """Return the groups of tensors of a folder, by name.

    Args:
        file_names: those of the folder's safetensors files that belong to groups.
    """
    paths: dict[str, list[Path]] = defaultdict(list)
    for file_name in sorted(file_names):
        stem = Path(file_name).stem
        part = _PART.fullmatch(stem)
        paths[stem if part is None else part[1]].append(folder / file_name)
    return {name: TensorGroup(of_group) for name, of_group in paths.items()}


def write_part(folder: Path, group: str, rank: int, tensors: Mapping[str, Held]) -> None:
    """Write one rank's part of a group: its pieces of tensors that the ranks share out; on rank 0 the others too.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    written = {name: tensor for name, tensor in tensors.items() if rank == 0 or isinstance(tensor, Piece)}
    pieces = {name: [p.start, list(p.shape)] for name, p in written.items() if isinstance(p, Piece)}
    path = folder / f"{group}-part-{rank:05d}.safetensors"
    write_tensors({name: held(tensor) for name, tensor in written.items()}, path, {_PIECES: json.dumps(pieces)})


def shape_of(tensors: Mapping[str, Held], name: str) -> torch.Size:
    """Return the shape of a whole tensor of a group, which is not read for that."""
    return tensors.shape(name) if isinstance(tensors, TensorGroup) else whole_shape(tensors[name])


@torch.no_grad()
def load_held(tensors: Mapping[str, Tensor], name: str, target: Tensor) -> None:
    """Copy a tensor of a group into another of its shape: all of it, or the piece that this rank holds of `target`."""
    piece = piece_of(target)
    if piece is not None:
        piece.values.copy_(elements_of(tensors, name, piece))
        mark_written([target])
    if piece is None or is_gathered(target):
        target.copy_(tensors[name])


def elements_of(tensors: Mapping[str, Tensor], name: str, piece: Piece) -> Tensor:
    """Return those elements [n] of a tensor of a group that belong to a piece."""
    start, stop = piece.start, piece.start + piece.values.numel()
    if isinstance(tensors, TensorGroup):
        return tensors.elements(name, start, stop)
    return tensors[name].view(-1)[start:stop]
