"""Digests of weights, and of what else a model's output depends on: two models are the same, or are told apart.

    tensor_digest         every bit of one tensor, for files
    weights_fingerprint   a few values of each tensor, for runs that go on
    model_fingerprint     the same and the config
    model_digest          every bit of a base and its config, for caches of log-probs

Digests of weights on their way to an engine, which are kept nowhere, are of `sync_digests`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.files.digests import as_json, digest_of_values, fast_digest, sha256_of_parts
from alignlab.models.adapters import is_of_adapter
from alignlab.models.decoder import causal_lm
from alignlab.models.router_state import is_router_state
from alignlab.models.weight_view import WeightView, view_of, whole_parameters, whole_tensors

FINGERPRINT_VALUES = 16
"""Values of each tensor in a fingerprint: enough to tell two models apart, few enough for models of any size."""
_DIGEST_FORMAT = 2
_NOT_COMPUTED_WITH = frozenset({
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict",
    "output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type", "initializer_range",
    "max_position_embeddings", "hub_config", "pad_token_id", "bos_token_id", "chunk_size_feed_forward",
})  # fmt: skip
"""Fields of a config that say where a model comes from, how it was made, or how it is called."""


def tensor_digest(tensor: Tensor) -> str:
    """Return 128 bits, in hexadecimal, of a tensor's dtype, shape and content; an empty model's tensors have none."""
    if tensor.is_meta:
        return fast_digest([f"{tensor.dtype}{tuple(tensor.shape)}"])
    plain = tensor.detach().contiguous().cpu()
    return fast_digest([f"{plain.dtype}{tuple(plain.shape)}", plain.view(-1).view(torch.uint8).numpy().data])


def tensor_digests(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return the digest of each tensor, by name."""
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    return {name: tensor_digest(tensor) for name, tensor in pairs}


@torch.no_grad()
def weights_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of names, shapes, dtypes and a few values of each tensor.

    Other weights have another fingerprint; a single flipped bit may go unseen.

    Args:
        tensors: whole ones, such as `whole_parameters` yields.
    """
    return sha256_of_parts(json.dumps([name, *_samples(tensor)]) for name, tensor in tensors)


def _samples(tensor: Tensor) -> list[Any]:
    """Return the shape, the dtype and some evenly spaced values of a tensor."""
    if tensor.is_meta:
        return [list(tensor.shape), str(tensor.dtype), []]
    stride = max(1, tensor.numel() // FINGERPRINT_VALUES)
    values = tensor.detach().flatten()[::stride][:FINGERPRINT_VALUES].double().tolist()
    return [list(tensor.shape), str(tensor.dtype), values]


def model_fingerprint(model: nn.Module, weights: WeightView | None = None) -> str:
    """Return a digest of the fingerprint of a language model's weights and of its `model_settings`.

    Args:
        weights: view of `model`; default: `view_of` it.
    """
    return digest_of_values([weights_fingerprint(whole_parameters(model, weights)), model_settings(model)])


def model_settings(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a language model's config on which its output depends, as JSON, by name."""
    config = causal_lm(model).config.to_dict()
    return {name: as_json(value) for name, value in sorted(config.items()) if name not in _NOT_COMPUTED_WITH}


def model_digest(model: nn.Module, weights: WeightView | None = None) -> str:
    """Return a digest of every byte of the weights, buffers and config that log-probs depend on, adapters left out.

    The digest does not depend on which layers have an adapter, nor on the load that routers count as they train.

    Args:
        weights: view of `model`; default: `view_of` it.
    """
    weights = weights or view_of(model)
    names = (n for n in weights.names() if not is_of_adapter(model, n) and not is_router_state(n))
    digests = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor_digest(tensor)
        for name, tensor in whole_tensors(weights, names)
    }
    content = [_DIGEST_FORMAT, causal_lm(model).config.to_json_string(), sorted(digests.items())]
    return fast_digest([json.dumps(content)])
