"""A short causal convolution of each channel over its last W tokens, which meets a prompt's end in each completion.

Shapes: N tokens, S segments, R sequences, C channels, W width of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import initialization as init

from alignlab.transfer import to_device
from alignlab.types import Segments


@dataclass(frozen=True)
class _Stream:
    """Segments in a row, each behind the W - 1 tokens that precede it.

    Attributes:
        tokens: [N + S (W - 1)], tokens, and from N on the S (W - 1) rows that roots begin with.
        places: [N], where the W tokens up to each token begin in the stream.
        ends: [S (W - 1)], places of the last W - 1 tokens of each segment.
    """

    tokens: Tensor
    places: Tensor
    ends: Tensor


class ShortConvolution(nn.Module):
    """silu(sum over i < W of weight_i x_(t - W + 1 + i)), channel by channel; before a sequence there are zeros.

    What a sequence keeps, to go on later, are its last W - 1 inputs. The weight is named as that of `nn.Conv1d`.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as `nn.Conv1d` does."""
        bound = self.weight.shape[-1] ** -0.5
        init.uniform_(self.weight, -bound, bound)

    @property
    def kept(self) -> int:
        """Inputs of each channel that a sequence keeps."""
        return int(self.weight.shape[-1]) - 1

    def forward(self, x: Tensor, segments: Segments | None, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the convolution of tokens, and the last inputs of each segment.

        Args:
            x: [N,C].
            segments: the packed sequences; None where each token is one more of a sequence of its own.
            start: [S,W-1,C], inputs before each root; None for zeros.

        Returns:
            [N,C], and [S,W-1,C].
        """
        if segments is None:
            assert start is not None
            window = torch.cat((start, x[:, None]), dim=1)
            return self._mixed(window.to(self._exact).unbind(1), x.dtype), window[:, 1:]
        count, stream = len(segments.lengths), _stream(segments, self.kept)
        before = x.new_zeros(count, self.kept, x.shape[1]) if start is None else start.to(x.dtype)
        rows = torch.cat((x, before.flatten(0, 1))).index_select(0, stream.tokens)
        exact = rows.to(self._exact)
        shifted = [exact[i : len(rows) - self.kept + i] for i in range(self.kept + 1)]
        mixed = self._mixed(shifted, x.dtype).index_select(0, stream.places)
        return mixed, rows.index_select(0, stream.ends).view(count, self.kept, -1)

    @property
    def _exact(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    def _mixed(self, shifted: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the activated sum of W tensors [..., C], each times its column of the weight, rounded once."""
        weight = self.weight[:, 0].to(self._exact)
        total = shifted[0] * weight[:, 0]
        for i in range(1, len(shifted)):
            total = torch.addcmul(total, shifted[i], weight[:, i])
        return silu(total).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.weight.shape[-1]}"


def _stream(segments: Segments, kept: int) -> _Stream:
    """Return the stream of packed sequences, cached on `segments`."""
    streams: dict[int, _Stream] = segments.__dict__.setdefault("_convolution_streams", {})
    if kept not in streams:
        streams[kept] = _make_stream(segments, kept)
    return streams[kept]


def _make_stream(segments: Segments, kept: int) -> _Stream:
    count = segments.num_tokens
    tokens: list[NDArray[np.int64]] = []
    places, ends = [], []
    at = 0
    rows = zip(segments.starts, segments.lengths, segments.prefixes, strict=True)
    for index, (start, length, prefix) in enumerate(rows):
        before = count + index * kept + np.arange(kept) if prefix < 0 else tokens[prefix][-kept:]
        stream = np.concatenate((before, np.arange(start, start + length)))
        tokens.append(stream)
        places.append(at + np.arange(length))
        ends.append(at + len(stream) - kept + np.arange(kept))
        at += len(stream)
    arrays = [torch.from_numpy(np.concatenate(part)) for part in (tokens, places, ends)]
    return _Stream(*to_device(arrays, segments.device))
