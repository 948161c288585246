"""Named tensors in one file, or in several of which each holds some rows of each tensor.

    policy.safetensors                                       every tensor, whole
    policy-part-00000.safetensors, policy-part-00001...      rows of each tensor, from ranks that hold no more

A part names in its header the first row of each tensor that it divides; the reader joins the parts, or reads the rows
that it needs, by how many ranks ever they were written.
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
from torch.distributed.tensor import DTensor

from alignlab.files.tensor_files import write_tensors
from alignlab.models.shards import rows_of

_PART = re.compile(r"(.+)-part-\d{5}")
_STARTS = "first_rows"


class _Place(NamedTuple):
    path: Path
    start: int
    num_rows: int


class TensorGroup(Mapping[str, Tensor]):
    """Tensors of one name in a folder, read when they are asked for.

    Args:
        paths: the files, which are read and not verified.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places: dict[str, list[_Place]] = defaultdict(list)
        self._shapes: dict[str, list[int]] = {}
        for path in paths:
            self._add(path)
        for places in self._places.values():
            places.sort(key=lambda place: place.start)

    def _add(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            starts = json.loads((file.metadata() or {}).get(_STARTS, "{}"))
            for name in file.keys():  # noqa: SIM118  # a file is no mapping
                shape = file.get_slice(name).get_shape()
                self._places[name].append(_Place(path, starts.get(name, 0), shape[0] if shape else 1))
                longer = self._shapes.setdefault(name, list(shape))
                if shape:
                    longer[0] = sum(place.num_rows for place in self._places[name])

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a whole tensor."""
        return torch.Size(self._shapes[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a tensor, from the files that hold some of them."""
        parts = []
        for place in self._places[name]:
            first, last = max(start, place.start), min(stop, place.start + place.num_rows)
            if first < last or start == stop:
                with safe_open(place.path, "pt") as file:
                    parts.append(file.get_slice(name)[first - place.start : max(last, first) - place.start])
            if start == stop:
                break
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __getitem__(self, name: str) -> Tensor:
        if self._shapes[name]:
            return self.rows(name, 0, self._shapes[name][0])
        with safe_open(self._places[name][0].path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


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


def write_part(folder: Path, group: str, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Write one rank's part of a group: its rows of each tensor that is spread over ranks; on rank 0 the others too.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    rows = {name: rows_of(tensor) for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    whole = {name: tensor for name, tensor in tensors.items() if rank == 0 and name not in rows}
    starts = {name: start for name, (_, start) in rows.items()}
    written = whole | {name: part for name, (part, _) in rows.items()}
    write_tensors(written, folder / f"{group}-part-{rank:05d}.safetensors", {_STARTS: json.dumps(starts)})


def shape_of(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    """Return the shape of a tensor of a group, which is not read for that."""
    return tensors.shape(name) if isinstance(tensors, TensorGroup) else tensors[name].shape


@torch.no_grad()
def load_rows(tensors: Mapping[str, Tensor], name: str, target: Tensor) -> None:
    """Copy a tensor of a group into another of its shape: all of it, or the rows that this rank holds of `target`."""
    rows, start = rows_of(target)
    if rows.dim() == 0:
        rows.copy_(tensors[name])
    elif isinstance(tensors, TensorGroup):
        rows.copy_(tensors.rows(name, start, start + len(rows)))
    else:
        rows.copy_(tensors[name][start : start + len(rows)])
