"""Weights of a checkpoint's safetensors, read slice by slice under our names: no tensor is in memory but the one read.

transformers' names of a family differ from ours in the experts of a mixture: the files hold a matrix for each, and our
parameters stack them, [E, out, in]. Kimi Linear's files have other names too, and its convolution in three parts.

Shapes: E experts, I intermediate size.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_STACKED = re.compile(r"(?P<block>.*)\.mlp\.experts\.(?P<projection>gate_up_proj|down_proj)$")
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of dtypes in the files."""
_MATRICES = (
    ("mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    ("block_sparse_moe", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),  # Mixtral
)
"""By the name of a mixture's block in the files: the matrices of an expert that lie below each other in ours."""
_RENAMED = ((".mlp.", ".block_sparse_moe."), (".self_attn.forget_gate.", ".self_attn."))
"""Parts of our names, and what files of Mixtral and Kimi Linear may have in their place."""
_CONVOLUTION = ".self_attn.conv1d.weight"


class Piece(NamedTuple):
    """A tensor of the files, and its place in a parameter.

    Attributes:
        name: in the files.
        expert: row of the parameter that it belongs to; None for a tensor of the parameter itself.
        rows: of the expert's matrix, or of the parameter; None for all.
    """

    name: str
    expert: int | None = None
    rows: slice | None = None


class WeightFiles:
    """The tensors of a model's folder.

    Args:
        folder: with `model.safetensors`, or the files that its index names.

    Attributes:
        shapes: of each tensor, by its name in the files.
    """

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, str] = {}
        for path in _files(folder):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  not a mapping
                    part = file.get_slice(name)
                    self._file_of[name], self._kinds[name] = path, part.get_dtype()
                    self.shapes[name] = tuple(part.get_shape())

    def pieces(self, name: str, shape: torch.Size) -> tuple[Piece, ...] | None:
        """Return the tensors that make up a parameter or buffer of ours; None if the files do not hold it whole."""
        if name in self.shapes:
            return (Piece(name),) if self.shapes[name] == tuple(shape) else None
        for ours, theirs in _RENAMED:
            renamed = name.replace(ours, theirs)
            if self.shapes.get(renamed) == tuple(shape):
                return (Piece(renamed),)
        if name.endswith(_CONVOLUTION):
            return self._parts_below_each_other([name.replace(".conv1d.", f".{part}_conv1d.") for part in "qkv"], shape)
        return self._experts(name, shape)

    def _experts(self, name: str, shape: torch.Size) -> tuple[Piece, ...] | None:
        """Return the matrices of single experts that make up a stacked parameter; None if the files lack one."""
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            return None
        for block, matrices in _MATRICES:
            prefix = f"{stacked['block']}.{block}.experts"
            parts = tuple(_expert_pieces(prefix, matrices[stacked["projection"]], shape))
            if all(self.shapes.get(piece.name) == _part_shape(piece, shape) for piece in parts):
                return parts
        return None

    def _parts_below_each_other(self, names: list[str], shape: torch.Size) -> tuple[Piece, ...] | None:
        """Return the tensors whose rows make up a parameter, in order; None if they do not."""
        heights = [self.shapes.get(name, (0,))[0] for name in names]
        if sum(heights) != shape[0] or any(self.shapes[name][1:] != tuple(shape[1:]) for name in names):
            return None
        ends = list(itertools.accumulate(heights))
        return tuple(
            Piece(name, rows=slice(end - height, end)) for name, height, end in zip(names, heights, ends, strict=True)
        )

    def read(self, pieces: tuple[Piece, ...], out: Tensor, rows: slice = slice(None)) -> None:
        """Fill a tensor with rows of a parameter, cast to its dtype, on its device.

        The files are opened for this tensor alone, so that what the system has mapped of them is given back.

        Args:
            pieces: of the parameter; see `pieces`.
            out: the rows.
            rows: of the parameter's first dimension: those of a shard; default: all.
        """
        start, stop, _ = rows.indices(self._num_rows(pieces))
        for path, of_file in itertools.groupby(pieces, key=lambda piece: self._file_of[piece.name]):
            with safe_open(path, "pt") as file:
                for piece in of_file:
                    if piece.expert is None and piece.rows is not None:
                        first, end = max(start, piece.rows.start), min(stop, piece.rows.stop)
                        if first < end:
                            part = file.get_slice(piece.name)[first - piece.rows.start : end - piece.rows.start]
                            out[first - start : end - start].copy_(part)
                    elif piece.expert is None:
                        out.copy_(file.get_slice(piece.name)[start:stop] if out.dim() else file.get_tensor(piece.name))
                    elif start <= piece.expert < stop:
                        out[piece.expert - start, piece.rows or slice(None)].copy_(file.get_tensor(piece.name))

    def can_map(self, pieces: tuple[Piece, ...], dtype: torch.dtype) -> bool:
        """Return whether a parameter lies in a file as it is: it is not put together, and has the dtype."""
        return pieces[0].expert is None and pieces[0].rows is None and self._kinds[pieces[0].name] == _KINDS.get(dtype)

    def mapped(self, pieces: tuple[Piece, ...]) -> Tensor:
        """Return a parameter as it lies in a file, mapped into memory; see `can_map`."""
        with safe_open(self._file_of[pieces[0].name], "pt") as file:
            tensor: Tensor = file.get_tensor(pieces[0].name)
        return tensor

    def _num_rows(self, pieces: tuple[Piece, ...]) -> int:
        last = pieces[-1]
        if last.expert is not None:
            return last.expert + 1
        return next(iter(self.shapes[last.name]), 1) if last.rows is None else last.rows.stop


def plan_of(
    files: WeightFiles, shapes: Mapping[str, torch.Size], *, may_remain: Callable[[str], bool] = lambda _: False
) -> dict[str, tuple[Piece, ...]] | None:
    """Return the pieces of each parameter and buffer; None if a tensor is missing, superfluous or of another shape.

    Args:
        shapes: by our names.
        may_remain: whether a tensor of the files, by its name, may be left unread.
    """
    plan: dict[str, tuple[Piece, ...]] = {}
    for name, shape in shapes.items():
        pieces = files.pieces(name, shape)
        if pieces is None:
            return None
        plan[name] = pieces
    used = {piece.name for pieces in plan.values() for piece in pieces}
    return plan if all(may_remain(name) for name in files.shapes.keys() - used) else None


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder's weights; none if it has others than safetensors."""
    index = folder / _INDEX
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / str(name) for name in names)
    return [folder / _SINGLE] if (folder / _SINGLE).is_file() else []


def _expert_pieces(prefix: str, matrices: tuple[str, ...], shape: torch.Size) -> Iterator[Piece]:
    """Yield the matrices of all experts of a stacked parameter [E, out, in]."""
    height = shape[1] // len(matrices)
    for expert in range(shape[0]):
        for number, matrix in enumerate(matrices):
            yield Piece(f"{prefix}.{expert}.{matrix}.weight", expert, slice(number * height, (number + 1) * height))


def _part_shape(piece: Piece, shape: torch.Size) -> tuple[int, ...]:
    assert piece.rows is not None
    return (piece.rows.stop - piece.rows.start, *shape[2:])
