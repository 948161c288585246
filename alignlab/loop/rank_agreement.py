"""Agreement of all ranks on the success of a block of work, and exchange of bytes between ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from alignlab.errors import RankError
from alignlab.runs.random_state import RandomState, packed, random_state, unpacked

_MAX_ERROR_CHARS = 1000
_KNOWN = "is_known_to_all_ranks"
"""Attribute of an error that all ranks have been told of."""


class RankAgreement:
    """Ends a block of work on every rank if it fails on one, so that no rank waits for another that is gone.

    Attributes:
        failed: whether a block has failed on any rank; equal on all ranks.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.failed = False

    @contextmanager
    def __call__(self, work: str) -> Iterator[None]:
        """Run a block of work that every rank does, in which ranks meet at inner blocks of this kind alone.

        A rank that fails outside of an inner block meets the others at the end of that block. They fail there, and do
        not exchange their reasons again at the end of the outer one.

        Args:
            work: name of the work, for the message, such as "evaluating after step 4".

        Raises:
            RankError: the block failed on another rank, which raises its own error.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            if getattr(error, _KNOWN, False):
                self.failed = True
                raise
            failure = error
        reasons = self._reasons(failure)
        self.failed = self.failed or any(reasons)
        if failure is not None:
            setattr(failure, _KNOWN, True)
            raise failure
        failures = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
        if failures:
            elsewhere = RankError(
                f"{work} must be done by every rank, and failed on {len(failures)} of {len(reasons)}; correct what "
                f"failed there, and go on by --resume. {'; '.join(failures)}"
            )
            setattr(elsewhere, _KNOWN, True)
            raise elsewhere

    def _reasons(self, failure: BaseException | None) -> list[str]:
        """Return the reason of each rank's failure, empty where there is none; every rank calls this together."""
        reason = "" if failure is None else f"{type(failure).__name__}: {failure}".strip()[:_MAX_ERROR_CHARS]
        try:
            return [content.decode(errors="replace") for content in gather_bytes(self._accelerator, reason.encode())]
        except RuntimeError:
            if failure is None:  # another rank is gone
                raise
            return [reason]


def gather_bytes(accelerator: Accelerator, content: bytes) -> list[bytes]:
    """Return the bytes of each rank, on every rank; all call this together."""
    if accelerator.num_processes == 1:
        return [content]
    content_bytes = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8).to(accelerator.device)
    length = torch.tensor([len(content)], device=accelerator.device)
    lengths = accelerator.gather(length).tolist()
    if not any(lengths):
        return [b""] * len(lengths)
    padded = content_bytes.new_zeros(1, max(*lengths, 1))
    padded[0, : len(content_bytes)] = content_bytes
    gathered: Tensor = accelerator.gather(padded)
    return [row[:size].numpy().tobytes() for row, size in zip(gathered.cpu(), lengths, strict=True)]


def json_of_ranks(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return the JSON value of each rank, on every rank; all call this together."""
    return [json.loads(content) for content in gather_bytes(accelerator, json.dumps(value).encode())]


def of_main_rank(accelerator: Accelerator, content: bytes) -> bytes:
    """Return the bytes of rank 0, on every rank; all call this together."""
    return gather_bytes(accelerator, content)[0]


def gather_random_states(accelerator: Accelerator) -> list[RandomState]:
    """Return the present state of the generators of each rank; all call this together."""
    state = random_state()
    if accelerator.num_processes == 1:
        return [state]
    return [unpacked(content) for content in gather_bytes(accelerator, packed(state))]
