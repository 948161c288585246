"""A policy as the kernels read it: packed weights, rotations by position, and the places of the cache.

Letters in shapes: D hidden size, H heads, K kv heads, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm
from alignlab.models.decoder_layer import DecoderLayer
from alignlab.models.merging import merged_module, wrappers
from alignlab.models.transformer import PolicyForCausalLM, rounded_multiplier
from alignlab.rollout.embedded.native.binding import Kernels, LayerStruct, ModelStruct, WeightStruct, address
from alignlab.rollout.embedded.native.packing import ACTIVATIONS, Packer, floats, norm_scale
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.rounding import Rounding

_LEAST_POSITIONS = 256


class NativeModel:
    """The present weights of a policy, adapters merged in, packed for the kernels.

    Args:
        model: the policy, which `coverage` has checked.
        kernels: for the dtype of its weights.
        rounding: of the weights; None packs them as they are.

    Attributes:
        struct: what the kernels are given.
        head: packed weight of the logits.
        num_embeddings: rows of the embedding table.
        num_bytes: of packed weights.
        rounding_s: seconds that rounding took.
    """

    def __init__(self, model: nn.Module, kernels: Kernels, rounding: Rounding | None = None) -> None:
        lm = causal_lm(model)
        assert isinstance(lm, PolicyForCausalLM)
        self.kernels = kernels
        self.config: PolicyConfig = lm.config
        adapted = set(wrappers(model).values())
        packer = Packer(kernels, lambda module: merged_module(module) if module in adapted else module, rounding)
        self._decoder: Any = lm.get_decoder()
        self._rotation_keys: list[str | None] = [layer.self_attn.rotation_key for layer in self._decoder.layers]
        layers = [self._layer(packer, layer, index) for index, layer in enumerate(self._decoder.layers)]
        self._layers = layers  # they hold what the copies in the array point to
        self._array = (LayerStruct * len(layers))(*layers)
        own_head = lm.get_output_embeddings()
        head = packer.plain(own_head)
        self.head: WeightStruct = packer.stacked([head.weight], [head.bias], rounded=packer.rounds(own_head))
        embeddings = packer.plain(lm.get_input_embeddings()).weight.detach()
        self.struct = self._model(embeddings, packer.plain(self._decoder.norm))
        self.num_embeddings, self.num_bytes, self.rounding_s = len(embeddings), packer.num_bytes, packer.rounding_s
        self._num_positions = 0
        self._rotations: dict[str, tuple[Tensor, Tensor]] = {}
        self._cached: dict[int, dict[str, Tensor]] | None = None

    def _layer(self, packer: Packer, layer: DecoderLayer, index: int) -> LayerStruct:
        """Return a layer without its rotation and its cache."""
        packed = LayerStruct()
        self._hold_attention(packed, packer, packer.plain(layer.self_attn))  # type: ignore[arg-type]
        fields = ("before_attention", "after_attention", "before_mlp", "after_mlp")
        for field, name in zip(fields, layer.norms, strict=True):  # of `NormPlaces`, in its order
            packed.hold(**{field: norm_scale(None if name is None else packer.plain(getattr(layer, name)))})
        mlp: Any = packer.plain(layer.mlp)
        if layer.sparse:
            packed.hold(sparse=packer.mixture(mlp, self.config))
        else:
            packed.hold(mlp=packer.feed_forward(mlp))
        return packed

    def _hold_attention(self, packed: LayerStruct, packer: Packer, attention: Any) -> None:
        """Put the projections, norms and numbers of a layer's attention into its structure."""
        names = ["qkv_proj"] if attention.fused else ["q_proj", "k_proj", "v_proj"]
        own = [getattr(attention, name) for name in names]
        projections = [packer.plain(projection) for projection in own]
        out = packer.plain(attention.o_proj)
        packed.hold(
            qkv=packer.stacked(
                [p.weight for p in projections], [p.bias for p in projections], rounded=packer.rounds(*own)
            ),
            out=packer.stacked([out.weight], [out.bias], rounded=packer.rounds(attention.o_proj)),
            sinks=floats(attention.sinks), norms_all_heads=int(attention.norms_all_heads), scaling=attention.scaling,
            softcap=float(attention.softcap or 0), window=attention.sliding_window or 0,
            rotary=attention.rotary_size or 0,
        )  # fmt: skip
        if attention.use_qk_norm:
            norms = packer.plain(attention.q_norm), packer.plain(attention.k_norm)
            packed.hold(query_norm=norm_scale(norms[0]), key_norm=norm_scale(norms[1]))

    def _model(self, embeddings: Tensor, norm: nn.Module) -> ModelStruct:
        config, dtype = self.config, self.kernels.dtype
        multiplier = config.embedding_multiplier
        struct = ModelStruct()
        struct.hold(
            layers=self._array, num_layers=len(self._layers), hidden=config.hidden_size,
            heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, head_size=config.head_dim,
            activation=ACTIVATIONS[config.hidden_act], eps=float(config.rms_norm_eps),
            embeddings=(embeddings.contiguous(), (-1, config.hidden_size), dtype),
            multiplier=1.0 if multiplier is None else float(rounded_multiplier(multiplier, dtype)),
            final_norm=norm_scale(norm),
        )
        return struct

    def reach(self, num_positions: int) -> None:
        """Have cosines and sines of the positions under a number."""
        if num_positions <= self._num_positions:
            return
        self._num_positions = max(_LEAST_POSITIONS, 1 << (num_positions - 1).bit_length())
        positions = torch.arange(self._num_positions)[None]
        with torch.inference_mode():
            rotations = self._decoder.rotations(positions, self.kernels.dtype)
        # Rounded as the model rounds them: the trainer rotates by the same numbers.
        self._rotations = {key: _halves(cos, sin) for key, (cos, sin) in rotations.items()}
        for struct, key in zip(self._array, self._rotation_keys, strict=True):
            if key is not None:
                cosines, sines = self._rotations[key]
                shape = (self._num_positions, struct.rotary // 2)
                struct.cosines = address(cosines, shape, torch.float32)
                struct.sines = address(sines, shape, torch.float32)

    def use_cache(self, cache: PagedCache) -> None:
        """Read and write the blocks of a cache, which are allocated here if they are not there yet."""
        if self._cached is cache.layers:  # a cache that is allocated anew has another dictionary
            return
        size, heads = self.config.head_dim, self.config.num_key_value_heads
        assert size is not None and heads is not None
        for index, struct in enumerate(self._array):
            window = cache.specs[index].window
            shape = (cache.total_blocks[window] * cache.block_size, heads * size)
            if index not in cache.layers:  # zeros, because the value of a hidden key is multiplied by 0
                cache.layers[index] = {name: torch.zeros(shape, dtype=self.kernels.dtype) for name in ("key", "value")}
            entries = cache.layers[index]
            struct.pool = cache.windows.index(window)
            struct.keys = address(entries["key"], shape, self.kernels.dtype)
            struct.values = address(entries["value"], shape, self.kernels.dtype)
        self._cached, self.struct.block_size = cache.layers, cache.block_size


def _halves(cosines: Tensor, signed_sines: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 cosines and sines [positions, size / 2] of a rotation [1, positions, 1, size]; see `rope`."""
    half = cosines.shape[-1] // 2
    return cosines[0, :, 0, :half].float().contiguous(), signed_sines[0, :, 0, half:].float().contiguous()
