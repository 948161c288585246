"""Memory that a training will take on the device of each rank, predicted from shapes: nothing is computed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.config.trainer import MemorySettings, ShardingSettings
from alignlab.functional.logprobs import block_rows, default_chunk_tokens
from alignlab.loop.learner import Learner
from alignlab.loop.master_weights import needs_master, state_bytes
from alignlab.models.cache_spec import cache_specs
from alignlab.models.decoder import causal_lm, hidden_states, output_head
from alignlab.models.kv_approximation.groups import GroupedRounding
from alignlab.models.kv_approximation.protocol import KVApproximation
from alignlab.models.recurrent.runs import Entries, Runs
from alignlab.models.routing import RoutingRecord
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.memory import planned_device, planned_ranks

_LOGIT_COPIES = 4
"""float32 tensors of a block's logits that exist at one time: logits, probabilities, and their gradients."""


class _Kept(torch.autograd.Function):
    """Stands in for FlexAttention, and keeps what that keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out.transpose(1, 2)


class _ShapesAlone:
    """A `PagedLayout` whose attention has the shapes of packed attention; recurrent layers compute one sequence.

    Args:
        model: without weights.
        num_tokens: of the pack.
        approximation: of keys and values; None for none.
    """

    keeps_latents = False

    def __init__(self, model: nn.Module, num_tokens: int, approximation: KVApproximation | None) -> None:
        lm = causal_lm(model)
        self._approximation = approximation
        self._model, self._dtype = model, lm.dtype
        self.runs = Runs(0, (num_tokens,), lm.device)

    def states(self, layer_idx: int) -> dict[str, Tensor]:
        """Return the entries of one sequence, without values."""
        entries = cache_specs(self._model)[layer_idx].sequence_entries(self._dtype)
        device = self.runs.device
        return {name: torch.zeros(1, *shape, dtype=dtype, device=device) for name, shape, dtype in entries}

    def keep_states(self, layer_idx: int, entries: Entries) -> None:
        """Keep nothing: no step follows."""

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor | None, **options: Any) -> Tensor:
        """Return [1,N,H,V] without values."""
        assert value is not None
        if isinstance(self._approximation, GroupedRounding):  # the tokens of complete groups are there twice
            num_more = key.shape[2] // self._approximation.group * self._approximation.group
            key, value = (torch.cat((x, x[:, :, :num_more]), 2) for x in (key, value))
        out: Tensor = _Kept.apply(query, key, value)
        return out


def training_bytes(
    learners: Mapping[str, Learner], frozen: Iterable[nn.Module], memory: MemorySettings, sharding: ShardingSettings
) -> dict[str, int]:
    """Return the bytes of weights, of gradients with the optimizer's state, and of activations, by part; on the device
    of one of the ranks of `predicted_for`.

    Nothing is known of architectures that are `transformers`' own, which may need values: the result is empty.

    Args:
        learners: all that is trained, on models without weights.
        frozen: models beside those: a reference, a teacher, reward models.
        memory: sizes of a forward and backward pass.
        sharding: what the ranks share out.
    """
    if not all(isinstance(causal_lm(learner.module.model), PolicyForCausalLM) for learner in learners.values()):
        return {}
    frozen = list(frozen)
    lasting = [module for module in frozen if not getattr(module, "rests_on_host", False)]
    visiting = [_storage_bytes(module.parameters()) for module in frozen if module not in lasting]
    modules = [*(learner.module for learner in learners.values()), *lasting]
    trained = [parameter for learner in learners.values() for parameter in learner.trained.values()]
    whole = [m for m in lasting if not getattr(m, "follows_policy", False)]
    return {
        "weights": _weight_bytes(modules, whole, sharding),
        "gradients and optimizer": _gradient_and_state_bytes(trained, sharding),
        **_average_bytes(learners, sharding),
        # A reference from the host scores while there are no activations of a training pass.
        "activations": max(*visiting, *(_activation_bytes(learner, memory) for learner in learners.values()), 0),
    }


def _weight_bytes(modules: Sequence[nn.Module], whole: Sequence[nn.Module], sharding: ShardingSettings) -> int:
    """Return the bytes of weights on one rank's device.

    Args:
        modules: all.
        whole: those of them that each rank holds whole under any strategy.
    """
    every = _storage_bytes(tensor for module in modules for tensor in module.parameters())
    if not sharding.spreads_weights:
        return every
    kept = _storage_bytes(tensor for module in whole for tensor in module.parameters())
    return kept + (0 if sharding.offload == "all" else (every - kept) // planned_ranks())


def _gradient_and_state_bytes(trained: Sequence[nn.Parameter], sharding: ShardingSettings) -> int:
    """Return the bytes of float32 gradients and of the optimizer's state on one rank's device."""
    gradients = sum(4 * parameter.numel() for parameter in trained)
    states = sum(state_bytes(parameter) for parameter in trained)
    if sharding.zero_stage:  # DeepSpeed updates a float32 copy of its own, of float32 weights too
        states += sum(4 * parameter.numel() for parameter in trained if not needs_master(parameter))
    elif sharding.spreads_weights:  # FSDP2 holds a weight in 16 bits as its float32 copy alone
        states -= sum(p.numel() * p.element_size() for p in trained if needs_master(p))
    gradients //= planned_ranks() if sharding.spreads_gradients else 1
    states //= planned_ranks() if sharding.spreads_training else 1
    return gradients + (states if sharding.offload == "none" else 0)


def _average_bytes(learners: Mapping[str, Learner], sharding: ShardingSettings) -> dict[str, int]:
    """Return the bytes of averages of weights, with the weights that are set aside in an evaluation; none without."""
    ranks = planned_ranks() if sharding.spreads_weights else 1
    averages = [learner.average for learner in learners.values() if learner.average is not None]
    kept = sum(average.num_bytes for average in averages)
    aside = sum(_storage_bytes(learner.trained.values()) for learner in learners.values() if learner.average)
    return {"average of weights": (kept + aside) // ranks} if averages else {}


def _activation_bytes(learner: Learner, memory: MemorySettings) -> int:
    """Return what a forward pass of one micro-batch keeps, and the logits of one chunk."""
    with learner.module.in_use():
        approximation = learner.module.kv_approximation
        kept = kept_bytes(learner.module.model, memory.tokens_per_microbatch, approximation)
    weight, kind = output_head(learner.module.model)[0], planned_device(learner.device).type
    rows = memory.logprob_chunk_tokens or default_chunk_tokens(kind)
    of_block = _LOGIT_COPIES * torch.float32.itemsize * min(rows, block_rows(weight.shape[0], kind))
    return kept + (rows * weight.element_size() + of_block) * weight.shape[0]


def kept_bytes(model: nn.Module, num_tokens: int, approximation: KVApproximation | None = None) -> int:
    """Return the bytes that a decoder's forward pass keeps for its backward pass, beside its weights.

    Args:
        model: a causal language model whose attention is "alignlab", without weights; left in training mode.
        num_tokens: of the pack.
        approximation: of keys and values, which the pass replays.
    """
    lm: Any = causal_lm(model)
    if getattr(lm.config, "num_routers", 0) and lm.dtype != torch.bfloat16:
        # Without values, torch has grouped products in bfloat16 alone.
        size: int = lm.dtype.itemsize // torch.bfloat16.itemsize
        return size * kept_bytes(copy.deepcopy(model).to(torch.bfloat16), num_tokens, approximation)
    _move_buffers(lm)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # holding the tensors, so that no later storage has the address of an earlier one

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens = torch.zeros(num_tokens, dtype=torch.long, device=lm.device)
    options = {"routing": RoutingRecord()} if getattr(lm.config, "num_routers", 0) else {}
    lm.train()  # checkpointing is of training alone
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = hidden_states(model, tokens, tokens, _ShapesAlone(model, num_tokens, approximation), **options)
    assert output.shape[0] == num_tokens
    return _storage_bytes(kept.values())


def _move_buffers(model: nn.Module) -> None:
    """Put the buffers of an empty model, which may have values, where its parameters are."""
    device = next(model.parameters()).device
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors, some of which may share one."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
