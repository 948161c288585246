"""The kernels' C interface: structures of addresses, each of a tensor that was checked and is held beside it.

Letters in shapes: N tokens, M rows of a product, D hidden size, H heads, K kv heads.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from alignlab.native.binding import Held, address, fields
from alignlab.native.build import BuildError, load_library

SOURCE = Path(__file__).parent / "source" / "kernels.cpp"
PANEL = 32
"""Outputs in a panel of a packed weight."""
LANES = 16
TILE_ROWS = 12
"""Queries whose scores a thread holds at one time."""


class WeightStruct(Held):
    """`Weight` in source/product.h."""

    _fields_: ClassVar = fields("*panels *bias outputs words format inputs groups *scales *shifts")


class RoundedRowsStruct(Held):
    """`RoundedRows` in source/rounded_rows.h."""

    _fields_: ClassVar = fields("*codes *scales *sums")


class FeedForwardStruct(Held):
    """`FeedForward` in source/model.h."""

    _fields_: ClassVar = [("gate_up", WeightStruct), ("down", WeightStruct)]


class ExpertsStruct(Held):
    """`Experts` in source/model.h."""

    _fields_: ClassVar = [
        *fields("num_experts num_chosen"), ("router", WeightStruct),
        *fields("*choice_bias scoring normalizes factor. exact_logits *experts"),
        ("shared", FeedForwardStruct), ("shared_gate", WeightStruct),
    ]


class LayerStruct(Held):
    """`Layer` in source/model.h."""

    _fields_: ClassVar = [
        ("qkv", WeightStruct), ("out", WeightStruct), ("mlp", FeedForwardStruct), ("sparse", ExpertsStruct),
        *fields(
            "*before_attention *after_attention *before_mlp *after_mlp *query_norm *key_norm *sinks norms_all_heads "
            "*cosines *sines rotary scaling. softcap. window pool *keys *values"
        ),
    ]


class ModelStruct(Held):
    """`Model` in source/model.h."""

    _fields_: ClassVar = fields(
        "*layers num_layers hidden heads kv_heads head_size inner activation eps. *embeddings multiplier. *final_norm "
        "block_size"
    )


class StepStruct(Held):
    """`Step` in source/model.h."""

    _fields_: ClassVar = [
        *fields(
            "*tokens *positions *works *starts *tables *logit_tokens num_tokens num_works width num_logits num_threads "
            "num_keys *residual *normed *qkv *queries *attended *activated *outputs *scores *gathered *gates *logits "
            "*orders *choices num_sparse"
        ),
        ("rounded", RoundedRowsStruct), *fields("*hidden"),
    ]


_FUNCTIONS = ("alignlab_sizes", "alignlab_pack", "alignlab_step", "alignlab_product", "alignlab_draw")
_STRUCTURES = (WeightStruct, LayerStruct, ModelStruct, StepStruct)


class Kernels:
    """The compiled kernels for one dtype of weights.

    Args:
        dtype: float32 or bfloat16.

    Attributes:
        per_word: numbers in 32 bits.

    Raises:
        BuildError: they could not be compiled, or are not of this package.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.per_word = 4 // dtype.itemsize
        self._library = load_library(SOURCE, dtype)
        for name in _FUNCTIONS:
            if not hasattr(self._library, name):
                raise BuildError(f"the compiled kernels lack {name}; remove them, they are compiled again")
            getattr(self._library, name).restype = None
        sizes = (ctypes.c_int64 * len(_STRUCTURES))()
        self._library.alignlab_sizes(sizes)
        if list(sizes) != [ctypes.sizeof(structure) for structure in _STRUCTURES]:
            raise BuildError(f"the structures of the compiled kernels have {list(sizes)} bytes, which are not ours")

    def words(self, count: int) -> int:
        """Return the words of 32 bits that so many numbers take."""
        return -(-count // self.per_word)

    def pack(self, weight: Tensor, panels: Tensor, *, first: int, per_panel: int, lane: int) -> None:
        """Write a weight [out, in] into panels [panels, words, 32] int32, from its row `first` on.

        Args:
            per_panel: rows of this weight in a panel, at its lanes from `lane` on.
        """
        rows, size = weight.shape
        source = address(weight, (rows, size), self.dtype)
        target = address(panels, (-1, self.words(size), PANEL), torch.int32)
        if first < 0 or lane + per_panel > PANEL or first + rows > per_panel * len(panels):
            raise ValueError(f"rows {first} to {first + rows} do not fit {len(panels)} panels of {per_panel}")
        self._library.alignlab_pack(
            ctypes.c_void_p(source), ctypes.c_int64(rows), ctypes.c_int64(size), ctypes.c_void_p(target),
            ctypes.c_int64(first), ctypes.c_int64(per_panel), ctypes.c_int64(lane),
            ctypes.c_int64(torch.get_num_threads()),
        )

    def step(self, model: ModelStruct, step: StepStruct) -> None:
        """Compute the layers of a model over the tokens of a step."""
        self._library.alignlab_step(ctypes.byref(model), ctypes.byref(step))

    def product(self, rows: Tensor, weight: WeightStruct) -> Tensor:
        """Return the product of rows [M, in] with a packed weight, [M, out] float32."""
        if rows.shape[1] % self.per_word or self.words(rows.shape[1]) != weight.words:
            raise ValueError(f"rows have {rows.shape[1]} numbers, and the weight reads {weight.words} words")
        source = address(rows, (-1, rows.shape[1]), self.dtype)
        output = torch.empty(len(rows), weight.outputs, dtype=torch.float32)
        rounded = RoundedRowsStruct()
        if weight.format:
            rounded.hold(
                codes=(torch.empty(len(rows), code_words(rows.shape[1]), dtype=torch.int32), (-1, -1), torch.int32),
                scales=(torch.empty(len(rows)), (-1,), torch.float32),
                sums=(torch.empty(len(rows), weight.groups, dtype=torch.int32), (-1, -1), torch.int32),
            )
        self._library.alignlab_product(
            ctypes.c_void_p(source), ctypes.c_int64(len(rows)), ctypes.byref(weight), ctypes.byref(rounded),
            ctypes.c_void_p(output.data_ptr()), ctypes.c_int64(torch.get_num_threads()),
        )
        return output

    def draw(
        self, logits: Tensor, keys: Tensor, positions: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a token for each row of logits [B,V] float32.

        Args:
            keys: [B] int64, of the completions.
            positions: [B] int64, number of the token in its completion.
            temperatures: [B] float32, 0 for greedy rows.

        Returns:
            Tokens [B] int64; log-probs [B] float32 under the distribution that is drawn from, 0 for greedy rows; and
            under that of temperature 1, nan where a logit is nan or +inf.
        """
        rows, size = logits.shape
        arguments = [
            ctypes.c_void_p(address(logits, (rows, size), torch.float32)), ctypes.c_int64(rows), ctypes.c_int64(size),
            ctypes.c_void_p(address(keys, (rows,), torch.int64)),
            ctypes.c_void_p(address(positions, (rows,), torch.int64)),
            ctypes.c_void_p(address(temperatures, (rows,), torch.float32)),
        ]
        tokens = torch.empty(rows, dtype=torch.int64)
        logprobs, raw = torch.empty(2, rows)
        results = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (tokens, logprobs, raw)]
        self._library.alignlab_draw(*arguments, *results, ctypes.c_int64(torch.get_num_threads()))
        return tokens, logprobs, raw


def code_words(size: int) -> int:
    """Return the words of 32 bits that a rounded row of a size takes at most: two codes of 16 bits in each."""
    return -(-size // 2)


@cache
def kernels_of(dtype: torch.dtype) -> Kernels:
    """Return the kernels for a dtype, which are compiled and loaded once in a process.

    Raises:
        BuildError: see `Kernels`.
    """
    return Kernels(dtype)
