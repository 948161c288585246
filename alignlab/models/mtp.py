"""Multi-token prediction: one more layer predicts the token after the next, from the trunk's state and the next token.

The layer runs over a stream: every token whose predecessor has a state, that is all but the first of each root. At
token t it reads the embedding of t and the trunk's state before t, and predicts the token after t. So a shared prompt
is computed once here too, although its last token has another successor in every completion.

Shapes: N tokens of a pack, T tokens of the stream, M masked tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alignlab.errors import ConfigError
from alignlab.functional.logprobs import chunked_logprobs
from alignlab.masked_tokens import masked_tokens
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm, output_head
from alignlab.models.decoder_layer import DecoderLayer
from alignlab.models.layers import make_norm
from alignlab.transfer import to_device
from alignlab.types import Segments

if TYPE_CHECKING:
    from alignlab.models.transformer import PolicyModel


class MultiTokenPrediction(nn.Module):
    """A layer of the last layer's kind, on the trunk's states and the next embeddings.

    Where it has experts, its router chooses by itself: nothing is recorded, counted or balanced.

    Reference: DeepSeek-AI (2024), arXiv:2412.19437, Section 2.2, at depth 1; names of weights as `MtpLayer` of
    `transformers` has them.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.enorm, self.hnorm = make_norm(config, size), make_norm(config, size)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.mtp_block = DecoderLayer(config, config.num_hidden_layers - 1, is_mtp=True)
        self.post_norm = make_norm(config, size)

    def forward(self, states: Tensor, embeddings: Tensor, stream: Stream, trunk: PolicyModel) -> Tensor:
        """Return the states [T,D] from which the tokens after those of the stream are predicted.

        Args:
            states: of the trunk, before each token of the stream, [T,D].
            embeddings: of the tokens of the stream, [T,D].
            stream: its layout.
            trunk: whose rotations the layer shares.
        """
        joined = torch.cat((self.enorm(embeddings), self.hnorm(states)), dim=-1)
        hidden = self.mtp_block(
            self.eh_proj(joined)[None], rotations=trunk.rotations(stream.position_ids[None], embeddings.dtype),
            attention_mask=None, layout=stream.segments,
        )
        return self.post_norm(hidden[0])


@dataclass(frozen=True)
class Stream:
    """The tokens of a pack whose predecessor has a state.

    Attributes:
        segments: of the stream.
        tokens: [T] their places in the pack.
        predecessors: [T] the places of the tokens before them.
        position_ids: [T] their positions in their sequences.
        places: [N] place of each token in the stream; -1 for the first of a root.
    """

    segments: Segments
    tokens: Tensor
    predecessors: Tensor
    position_ids: Tensor
    places: Tensor


def stream_of(segments: Segments) -> Stream | None:
    """Return the stream of packed sequences, cached on `segments`; None if all are of one token."""
    if "_mtp_stream" not in segments.__dict__:
        segments.__dict__["_mtp_stream"] = _make_stream(segments)
    stream: Stream | None = segments.__dict__["_mtp_stream"]
    return stream


def _make_stream(segments: Segments) -> Stream | None:
    rows: list[tuple[int, int, int, int]] = []
    new_index: dict[int, int] = {-1: -1}
    for index, (length, prefix, sequence, group) in enumerate(
        zip(segments.lengths, segments.prefixes, segments.sequence_ids, segments.group_ids, strict=True)
    ):
        length -= prefix < 0
        new_index[index] = len(rows) if length else -1
        if length:
            rows.append((length, new_index[prefix], sequence, group))
    if not rows:
        return None
    is_first = torch.zeros(segments.num_tokens, dtype=torch.bool)
    is_first[[start for start, prefix in zip(segments.starts, segments.prefixes, strict=True) if prefix < 0]] = True
    tokens = (~is_first).nonzero()[:, 0]
    places = torch.full((segments.num_tokens,), -1)
    places[tokens] = torch.arange(len(tokens))
    tokens, places = to_device([tokens, places], segments.device)
    lengths, prefixes, sequences, groups = (tuple(column) for column in zip(*rows, strict=True))
    return Stream(
        Segments(lengths, prefixes, sequences, groups, segments.device), tokens, segments.predecessors[tokens],
        segments.position_ids[tokens], places,
    )


def mtp_losses(
    model: nn.Module, states: Tensor, tokens: Tensor, segments: Segments, mask: Tensor,
    *, chunk_tokens: int | None, num_ids: int | None,
) -> Tensor | None:
    """Return the weighted loss [M] of the masked tokens, predicted from two tokens before; None without such a layer.

    A token that has only one token before it has a loss of 0.

    Args:
        model: a causal language model, with or without adapters.
        states: of the trunk, [N,D].
        tokens: [N].
        segments: how they divide into sequences.
        mask: [N] bool, tokens that are trained on.
        chunk_tokens: tokens whose logits exist at one time.
        num_ids: ids that share the probability, from 0 on; None for all.
    """
    lm = causal_lm(model)
    layer, stream = getattr(lm, "mtp", None), stream_of(segments)
    if layer is None or stream is None:
        return None
    embeddings = lm.model.embedded(tokens[stream.tokens])
    weight, bias, softcap = output_head(model)
    weight, bias = weight[:num_ids], None if bias is None else bias[:num_ids]
    if lm.config.mtp_detach:
        states, embeddings, weight = states.detach(), embeddings.detach(), weight.detach()
    hidden = layer(states.index_select(0, stream.predecessors), embeddings, stream, lm.model)
    found = masked_tokens(mask, segments.predecessors)
    places = stream.places[found.predecessors]
    logprobs, _ = chunked_logprobs(
        hidden.index_select(0, places.clamp_min(0)), weight, tokens[found.indices], bias=bias, softcap=softcap,
        chunk_tokens=chunk_tokens,
    )
    return -lm.config.mtp_loss_coef * logprobs * (places >= 0)


def check_trains(model: nn.Module, trainer: str, *, trains_mtp: bool) -> None:
    """Raise if a model has a layer for multi-token prediction that a trainer does not train.

    Raises:
        ConfigError: with the trainer.
    """
    if getattr(causal_lm(model), "mtp", None) is not None and not trains_mtp:
        raise ConfigError(
            f"num_mtp_layers is 1, and {trainer} does not train multi-token prediction; use SFT or GRPO, or a model "
            "with num_mtp_layers: 0"
        )
