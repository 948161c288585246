"""The places of norms in a decoder layer, and how attention and feed-forward are added to the residual stream."""

from __future__ import annotations

from typing import NamedTuple


class NormPlaces(NamedTuple):
    """Names of a layer's norms, those of the Hub families; None where there is no norm.

    Attributes:
        before_attention, before_feed_forward: norms of what a sublayer reads.
        after_attention, after_feed_forward: norms of what a sublayer gives, before it is added to the residual stream.
    """

    before_attention: str | None = None
    after_attention: str | None = None
    before_feed_forward: str | None = None
    after_feed_forward: str | None = None


NORM_PLACES = {
    "pre": NormPlaces(before_attention="input_layernorm", before_feed_forward="post_attention_layernorm"),
    "post": NormPlaces(after_attention="post_attention_layernorm", after_feed_forward="post_feedforward_layernorm"),
    "sandwich": NormPlaces(
        before_attention="input_layernorm", after_attention="post_attention_layernorm",
        before_feed_forward="pre_feedforward_layernorm", after_feed_forward="post_feedforward_layernorm",
    ),
}  # fmt: skip
"""By `norm_position`: pre-norm, Xiong et al. (2020), arXiv:2002.04745; norms of the outputs, OLMo Team (2024),
arXiv:2501.00656; both, Gemma Team (2024), arXiv:2408.00118."""

PARALLEL = NormPlaces(before_attention="input_layernorm")
"""One norm, which attention and feed-forward both read: Chowdhery et al. (2022), arXiv:2204.02311, Sec. 2."""
