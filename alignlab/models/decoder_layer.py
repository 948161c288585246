"""One layer of the decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from alignlab.models.attention_kinds import make_attention
from alignlab.models.blocks import NORM_PLACES, PARALLEL
from alignlab.models.config import PolicyConfig
from alignlab.models.layers import make_feed_forward, make_norm
from alignlab.models.mixing_layer import MixingLayer
from alignlab.models.moe import SparseFeedForward
from alignlab.models.rope import Rotation
from alignlab.models.routing import RoutingRecord


class DecoderLayer(GradientCheckpointingLayer):
    """Attention or a recurrent layer, then feed-forward, each added to the residual stream, with norms by the config.

    Args:
        config: of the model.
        layer_idx: number of the layer, which says its kinds of attention and feed-forward; of the first one where
            several share its weights.
        is_mtp: the layer is one for multi-token prediction, whose feed-forward the config names apart; no record holds
            its choices of experts.
    """

    def __init__(self, config: PolicyConfig, layer_idx: int, *, is_mtp: bool = False) -> None:
        super().__init__()
        assert config.mlp_layer_types is not None
        mixing = make_attention(config, layer_idx)
        self._mixing_name = mixing.name_in_layer
        self.add_module(mixing.name_in_layer, mixing)
        self.sparse = (config.mtp_mlp_layer_type if is_mtp else config.mlp_layer_types[layer_idx]) == "sparse"
        self.mlp: nn.Module
        if self.sparse:
            self.mlp = SparseFeedForward(config, None if is_mtp else config.sparse_layers.index(layer_idx))
        else:
            self.mlp = make_feed_forward(config)
        self.residual_dropout = config.residual_dropout
        self.is_parallel = config.parallel_attn
        self.norms = PARALLEL if self.is_parallel else NORM_PLACES[config.norm_position]
        for name in filter(None, self.norms):
            self.add_module(name, make_norm(config, config.hidden_size))

    def forward(
        self, hidden_states: Tensor, *, rotations: dict[str, Rotation], routing: RoutingRecord | None = None,
        layer_idx: int | None = None, **kwargs: Any,
    ) -> Tensor:
        """Return hidden states [B,N,hidden size] after the layer.

        Args:
            rotations: by `MixingLayer.rotation_key`.
            layer_idx: number of the layer that is computed, where several share the weights.
        """
        mixing: MixingLayer = getattr(self, self._mixing_name)
        if layer_idx is not None:  # a checkpointed layer sets it again, so that a recomputation is of the same layer
            mixing.layer_idx = layer_idx
        rotation = None if mixing.rotation_key is None else rotations[mixing.rotation_key]
        normed = self._normed(self.norms.before_attention, hidden_states)
        if mixing.routes:
            kwargs["routing"] = routing
        attended, _ = mixing(normed, position_embeddings=rotation, **kwargs)
        if self.is_parallel:
            return hidden_states + self._dropped(attended) + self._dropped(self._fed_forward(normed, routing))
        hidden_states = hidden_states + self._dropped(self._normed(self.norms.after_attention, attended))
        fed = self._fed_forward(self._normed(self.norms.before_feed_forward, hidden_states), routing)
        return hidden_states + self._dropped(self._normed(self.norms.after_feed_forward, fed))

    def _normed(self, name: str | None, hidden_states: Tensor) -> Tensor:
        """Return hidden states under the norm of a name; as they are where the layer has none in that place."""
        return hidden_states if name is None else getattr(self, name)(hidden_states)

    def _dropped(self, added: Tensor) -> Tensor:
        """Return what is added to the residual stream, in training without the part that is dropped."""
        return F.dropout(added, self.residual_dropout, self.training)

    def _fed_forward(self, hidden_states: Tensor, routing: RoutingRecord | None) -> Tensor:
        return self.mlp(hidden_states, routing) if self.sparse else self.mlp(hidden_states)
