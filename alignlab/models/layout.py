"""The one seam between a model and how its tokens are laid out: the attention function "alignlab".

`transformers` looks attention up by name, and hands keyword arguments of a model's forward down to it. A model whose
`config._attn_implementation` is "alignlab" is told the layout of its flat tokens by the keyword `layout`:

    Segments       packed sequences, some of which share a prompt; in training   -> `packed_attention`
    PagedLayout    the rollout engine's batch over its cache                      -> `PagedLayout.attend`
                   (layers that keep states of sequences: `recurrent.runs.StateLayout`)
    None           an ordinary padded batch, as in `model.generate()`             -> torch's own attention

Shapes: N tokens, H heads, K kv heads, D head size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignlab.errors import ConfigError
from alignlab.models.kv_approximation.protocol import Replay
from alignlab.models.packed_attention import packed_attention
from alignlab.types import Segments

ATTENTION = "alignlab"
OTHER_ATTENTION = (
    "load it with alignlab.models.hub.checkpoints.load_model or attn_implementation='eager', which train it on padded "
    "batches, and generate with vLLM (rollout.engine)"
)


class PagedLayout(Protocol):
    """A layout that caches what layers keep of earlier tokens itself.

    Attributes:
        keeps_latents: layers with latent attention hand their latents over, and not the keys and values of all heads.
    """

    keeps_latents: bool

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor | None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None = None,
    ) -> Tensor:
        """Return attention of `query` [1,H,N,D] to `key` [1,K,N,D], `value` [1,K,N,V] and cached tokens: [1,N,H,V].

        Args:
            value: None for a layer that keeps latents: its cache spec says which numbers of the key are the value.
            sinks: see `attention`.
        """
        ...


Layout = Segments | PagedLayout
_calls = threading.local()


def keeps_latents(layout: Layout | None) -> bool:
    """Return whether layers with latent attention hand their latents to a layout, to be cached."""
    return layout is not None and not isinstance(layout, Segments) and layout.keeps_latents


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor | None, attention_mask: Tensor | None,
    *, scaling: float, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, layout: Layout | None = None, kv_replay: Replay | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with the arguments that `transformers` hands to an attention function.

    Args:
        module: the attention module; its `layer_idx` tells a paged layout which layer's cache to use.
        query, key, value: [1,H,N,D], [1,K,N,D], [1,K,N,V], positions already applied; no value where a paged layout is
            given latents.
        attention_mask: read only where there is no layout.
        scaling: factor of the scores, before the cap.
        sliding_window: a token sees this many tokens, itself included; None sees all.
        softcap: scores become cap * tanh(score / cap).
        s_aux: [H], attention sinks: a logit of each head that joins the softmax, uncapped, and adds nothing.
        layout: see the top of this module.
        kv_replay: of the engine's cache, for packed sequences.

    Returns:
        ([1,N,H,V], None); attention weights are never formed.

    Raises:
        ConfigError: the model has position biases, or dropout with a layout.
    """
    if kwargs.get("position_bias") is not None:
        raise ConfigError(
            f"attention 'alignlab' has no position biases, which {type(module).__name__} uses; {OTHER_ATTENTION}"
        )
    if layout is None:
        assert value is not None
        return _padded(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap, sinks=s_aux,
            **kwargs,
        ), None
    if dropout:
        raise ConfigError(
            f"attention_dropout is {dropout}, and packed attention has none; set it to 0, or call "
            "alignlab.models.dropout.switch_off_dropout(model), as every trainer does"
        )
    count_call()
    options: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "sinks": s_aux}
    if isinstance(layout, Segments):
        assert value is not None
        if kv_replay is not None:
            return kv_replay.attend(cast(int, module.layer_idx), query, key, value, layout, **options), None
        return packed_attention(query, key, value, layout, **options), None
    return layout.attend(cast(int, module.layer_idx), query, key, value, **options), None


def _padded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    *, scaling: float, dropout: float, softcap: float | None, sinks: Tensor | None, **kwargs: Any,
) -> Tensor:
    """Compute attention of an ordinary batch. The mask comes from `transformers`, and holds any sliding window."""
    if softcap is None and sinks is None:
        kwargs.pop("output_attentions", None)
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ key.to(exact).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # with -inf, padded queries, which see no key, would become nan
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.to(exact).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    weights = nn.functional.dropout(weights.to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2)


def count_call() -> None:
    """Note that a layer has computed its tokens by a layout."""
    _calls.count = layout_calls() + 1


@contextmanager
def computed_beforehand() -> Iterator[None]:
    """Leave calls in the block out of the count, of a layer that is computed once more than the model's pass needs."""
    before = layout_calls()
    try:
        yield
    finally:
        _calls.count = before


def layout_calls() -> int:
    """Return how often a layer of this thread has computed its tokens by a layout."""
    return getattr(_calls, "count", 0)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


