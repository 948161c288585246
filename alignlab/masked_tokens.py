"""The places of the tokens that a mask asks about, found once for each mask.

How many tokens a mask holds is known where the mask was made, on the host. On CUDA a question for it makes the host
wait until all that was queued is done, so the answer goes to the device together with the mask.

Shapes: N tokens of a pack, M masked ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from alignlab.errors import DataError


class MaskedTokens(NamedTuple):
    """Places of masked tokens.

    Attributes:
        indices: [M] of each masked token, ascending.
        predecessors: [M] of the token whose hidden state predicts it.
    """

    indices: Tensor
    predecessors: Tensor


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def masked_tokens(mask: Tensor, predecessors: Tensor) -> MaskedTokens:
    """Return the places of a mask's tokens; a mask is not written to afterwards.

    Args:
        mask: [N] bool, tokens that are asked about; none may be the first of a sequence.
        predecessors: [N], see `Segments.predecessors`.

    Raises:
        DataError: a masked token has no predecessor.
    """
    if mask not in _known:
        index = mask.nonzero()[:, 0]
        places = MaskedTokens(index, predecessors[index])
        if bool((places.predecessors < 0).any()):
            raise DataError("the mask holds a sequence's first token, which nothing predicts; leave it out of the mask")
        _known[mask] = places
    known: MaskedTokens = _known[mask]
    return known


def is_known(mask: Tensor) -> bool:
    """Return whether the places of a mask's tokens are known."""
    return mask in _known


def remember(mask: Tensor, places: MaskedTokens) -> None:
    """Store the places of a mask's tokens."""
    _known[mask] = places


def remember_count(mask: Tensor, predecessors: Tensor, count: int) -> None:
    """Find the places of the tokens of a mask that has `count` of them, without a question to the device.

    The mask leaves tokens out of another one, of which each has a predecessor.
    """
    index = torch.nonzero_static(mask, size=count)[:, 0]
    remember(mask, MaskedTokens(index, predecessors[index]))
