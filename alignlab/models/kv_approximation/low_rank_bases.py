"""The bases of a cache in few dimensions: measured once, on the first prompts, and kept with the run.

A model has one object of them, which its trainer and its engine share. They are measured where that object is first
needed and are the same from then on, whatever becomes of the weights; a checkpoint holds them.

Shapes: K kv heads, D size of a head, r dimensions that are kept.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.config.kv_cache import LowRankCache
from alignlab.errors import ConfigError
from alignlab.files.digests import digest_of_values
from alignlab.models.decoder import causal_lm, hidden_states
from alignlab.models.evaluation_mode import evaluation_mode
from alignlab.models.kv_approximation.rotations import KeyRotation, key_rotations
from alignlab.models.packed_attention import packed_attention
from alignlab.models.shards import is_spread
from alignlab.types import Segments

_NAMES = ("key", "value")
_ATTRIBUTE = "_low_rank_bases"
_PASS_TOKENS = 2048


class LowRankBases:
    """Bases of the keys and values of each layer.

    Args:
        settings: the dimensions to keep, and the tokens to measure on.

    Attributes:
        rotations: of each layer's keys.
        ranks: dimensions that are kept of keys and of values; empty until they are measured.
    """

    def __init__(self, settings: LowRankCache) -> None:
        self.settings = settings
        self.rotations: dict[int, KeyRotation] = {}
        self.ranks: dict[str, int] = {}
        self._bases: dict[str, dict[int, Tensor]] = {}
        self._state: dict[str, Any] | None = None

    def rank_of(self, name: str, size: int) -> int:
        """Return the dimensions that are kept of a "key" or a "value" of D numbers."""
        return self.ranks.get(name, self.settings.rank or size)

    def basis(self, layer_idx: int, name: str, device: torch.device) -> Tensor:
        """Return the basis [K,r,D] float32 of a layer's "key" or "value", its rows orthonormal."""
        basis = self._bases[name][layer_idx]
        if basis.device != device:
            with torch.inference_mode(False):  # the engine may be the first that asks, and the trainer needs a gradient
                basis = self._bases[name][layer_idx] = basis.to(device)
        return basis

    def measure(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        """Measure the bases on the first tokens of prompts, unless they are known.

        Raises:
            ConfigError: there are too few tokens, a model is spread over ranks, or a layer's rotation is not known.
        """
        if self.ranks:
            return
        if is_spread(model):
            raise ConfigError(
                "rollout.kv_cache is low_rank, which is measured on the whole model, and the model is spread over "
                "ranks; use another kv_cache, or a strategy that keeps it whole"
            )
        chosen = self.chosen_tokens(prompts)
        self.rotations = key_rotations(model)
        moments = _Moments(self.rotations)
        with torch.inference_mode(False), torch.no_grad(), evaluation_mode(causal_lm(model).modules()):
            for tokens in _passes(chosen):
                moments.add(model, tokens)
        self._choose(moments)

    def chosen_tokens(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the tokens of prompts on which bases are measured.

        Raises:
            ConfigError: there are too few.
        """
        chosen = _first_tokens(prompts, self.settings.calibration_tokens)
        least = self.settings.rank or 1
        if sum(map(len, chosen)) < least:
            raise ConfigError(
                f"rollout.kv_cache is low_rank, which is measured on prompts, and must have at least {least} tokens of "
                f"them, but {len(prompts)} prompts have {sum(map(len, chosen))}; give more prompts, or lower "
                "kv_cache.rank"
            )
        return chosen

    def state(self) -> dict[str, Any]:
        """Return the settings, and the bases to the bit, as JSON."""
        if self._state is None:
            self._state = {
                "settings": _key_of(self.settings),
                "bases": {
                    name: {
                        str(layer_idx): {
                            "shape": list(basis.shape),
                            "numbers": base64.b64encode(basis.cpu().contiguous().numpy().tobytes()).decode(),
                        } for layer_idx, basis in bases.items()
                    } for name, bases in self._bases.items()
                },
            }  # fmt: skip
        return self._state

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take back what `state` gave; keep what is measured if that had other settings, or there was nothing."""
        if state is None or state["settings"] != _key_of(self.settings):
            return
        for name, bases in state["bases"].items():
            self._bases[name] = {
                int(layer_idx): torch.frombuffer(
                    bytearray(base64.b64decode(stored["numbers"])), dtype=torch.float32
                ).view(stored["shape"])
                for layer_idx, stored in bases.items()
            }  # fmt: skip
            self.ranks[name] = next(iter(self._bases[name].values())).shape[1]
        self._state = None

    def _choose(self, moments: _Moments) -> None:
        """Take the leading dimensions of each head: as many as the settings name, or as hold the energy."""
        for name in _NAMES:
            vectors, energies = {}, []
            for layer_idx, moment in moments.sums[name].items():
                values, columns = torch.linalg.eigh(moment.cpu())  # rising
                vectors[layer_idx] = columns.flip(-1).transpose(-1, -2)  # [K,D,D], the largest first
                energies.append(values.flip(-1).clamp_min(0))
            rank = self.settings.rank or _rank_for(energies, self.settings.energy or 1.0)
            self.ranks[name] = rank
            self._bases[name] = {i: v[:, :rank].to(torch.float32).contiguous() for i, v in vectors.items()}


class _Moments:
    """Sums of k k^T over tokens, of each head of each layer, in float64; a replay that approximates nothing."""

    def __init__(self, rotations: Mapping[int, KeyRotation]) -> None:
        self._rotations = rotations
        self.sums: dict[str, dict[int, Tensor]] = {name: {} for name in _NAMES}

    def add(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        """Add the tokens of prompts."""
        device, count = next(model.parameters()).device, len(prompts)
        segments = Segments(
            tuple(map(len, prompts)), (-1,) * count, tuple(range(count)), tuple(range(count)), device
        )
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        hidden_states(model, tokens, segments.position_ids, segments, kv_replay=self)

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, segments: Segments, **options: Any
    ) -> Tensor:
        """Add a layer's keys and values, and return packed attention."""
        turned = self._rotations[layer_idx].rotate(key[0].double(), segments.position_ids, back=True)
        for name, entries in (("key", turned), ("value", value[0].double())):
            moment = entries.transpose(1, 2) @ entries  # [K,D,D]
            sums = self.sums[name]
            sums[layer_idx] = moment if layer_idx not in sums else sums[layer_idx] + moment
        return packed_attention(query, key, value, segments, **options)


def bases_of(model: nn.Module | None, settings: LowRankCache) -> LowRankBases:
    """Return the bases of a model, which all that compute with it share; those of no model are its own."""
    if model is None:
        return LowRankBases(settings)
    held = vars(causal_lm(model)).setdefault(_ATTRIBUTE, {})
    bases: LowRankBases = held.setdefault(_key_of(settings), LowRankBases(settings))
    return bases


def _key_of(settings: LowRankCache) -> str:
    """Return what the bases depend on of a cache's settings."""
    return settings.model_dump_json(exclude={"replay"})


def calibration_digest(settings: LowRankCache, prompts: Sequence[Sequence[int]]) -> str:
    """Return a digest of the tokens of prompts on which bases are measured."""
    return digest_of_values(_first_tokens(prompts, settings.calibration_tokens))


def _rank_for(energies: Sequence[Tensor], share: float) -> int:
    """Return the fewest dimensions that hold a share of the energy of all heads together.

    Args:
        energies: [K,D] of each layer, each head's falling.
    """
    total = torch.cat([energy / energy.sum(-1, keepdim=True).clamp_min(1e-300) for energy in energies]).mean(0)
    reached = total.cumsum(0) >= share * total.sum() - 1e-12
    return int(reached.int().argmax()) + 1


def _first_tokens(prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Return the first `count` tokens of prompts, each for itself."""
    chosen: list[list[int]] = []
    for prompt in prompts:
        if count <= 0:
            break
        if prompt:
            chosen.append(list(prompt[:count]))
            count -= len(chosen[-1])
    return chosen


def _passes(prompts: Sequence[list[int]]) -> list[list[list[int]]]:
    """Return the prompts in lists of few tokens."""
    passes: list[list[list[int]]] = [[]]
    for prompt in prompts:
        if passes[-1] and sum(map(len, passes[-1])) + len(prompt) > _PASS_TOKENS:
            passes.append([])
        passes[-1].append(prompt)
    return passes
