"""What the tests on a pretended GPU share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.functional import logprobs, products
from alignlab.models import flex_attention, layers, layout, paged_flex
from alignlab.models.kv_approximation import (
    evicted_tokens,
    eviction,
    low_rank,
    low_rank_bases,
    rotations,
    rounding,
    sparse_rows,
)
from alignlab.rollout.embedded import runner, sampling, weights
from alignlab.rollout.embedded.native import choice
from tests.gpu.flex_stand_in import as_on_a_gpu, dense_flex, paged_stand_in
from tests.gpu.graph_stand_in import pretend_recording
from tests.gpu.pretended import PretendedGPU

WHOLE = 1 << 40
"""Logits in a block, so many that there is one block."""


class TorchNorm:
    """The norm that a GPU computes, in place of the one that is faster on a CPU."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["abc abd ab ba 123"], vocab_size=262)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[PretendedGPU]]:
    """A context in which the machine has a GPU."""
    monkeypatch.setattr(flex_attention, "_compiled_flex", lambda *_: dense_flex)
    monkeypatch.setattr(paged_flex, "_compiled_flex", paged_stand_in)
    pretend_recording(monkeypatch)

    @contextmanager
    def pretended() -> Iterator[PretendedGPU]:
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            with PretendedGPU() as mode:
                yield mode
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return pretended


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[Any]]:
    """A context on the CPU in which every choice by device is made as on a GPU, so that results are equal."""

    @contextmanager
    def plain() -> Iterator[None]:
        AcceleratorState._reset_state(reset_partial_state=True)
        with monkeypatch.context() as patch, sdpa_kernel(SDPBackend.MATH):  # which the pretended GPU takes
            approximations = (rounding, eviction, evicted_tokens, sparse_rows, low_rank, low_rank_bases, rotations)
            patch.setattr(products, "has_fast_bfloat16", lambda: True)
            for module in (layout, *approximations):
                patch.setattr(module, "packed_attention", as_on_a_gpu)
            patch.setattr(layers, "_CPUNorm", TorchNorm)
            patch.setattr(runner, "reads_in_place", lambda device: True)
            patch.setattr(paged_flex, "_compiled_flex", paged_stand_in)
            patch.setattr(weights, "_packing_helps", lambda model: False)
            patch.setattr(choice, "why_not_native", lambda *args, **options: "as on a GPU")
            patch.setattr(logprobs, "CPU_BLOCK_LOGITS", logprobs.GPU_BLOCK_LOGITS)
            patch.setattr(logprobs, "CPU_CHUNK_TOKENS", logprobs.GPU_CHUNK_TOKENS)
            patch.setattr(sampling, "_BLOCK_ELEMENTS", WHOLE)
            yield

    return plain
