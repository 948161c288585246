"""Verification that an engine runs on the trainer's weights, by tensor digests and by canary log-probs.

Digests reveal a tensor that was lost, swapped, stale or damaged on its way, to the bit and by name. They cannot reveal
how an engine then packs or fuses it. For that the engine samples a canary, a few completions, and the trainer computes
the log-probs of the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from alignlab.data.packing import pack_rollouts
from alignlab.errors import RolloutError
from alignlab.models.evaluation_mode import evaluation_mode
from alignlab.models.policy import Policy
from alignlab.models.sync_digests import sync_digests
from alignlab.types import Rollout, Segments

GATES = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Largest allowed difference of a canary token's log-prob from the trainer's, nats, by dtype. Measured: correct weights
stay under 5e-5 in float32 and 0.1 in bfloat16; wrong weights in a single layer differ by more than a nat."""
ROUNDED_GATE = 2.0
"""The same for an engine that rounds weights or its cache to 8 bits or less. In fp8 a number has 4 significant bits,
where bfloat16 has 8, so a product's rounding error is 16 times as large; over a sum the errors average. An estimate:
it was never measured on a device. Such a canary finds weights that are wrong everywhere, and leaves single layers to
the digests."""


@dataclass(frozen=True)
class CanaryGap:
    """Absolute difference of an engine's log-probs from the trainer's over all canary tokens, nats."""

    mean: float
    largest: float
    num_tokens: int


def adapter_digests(
    model: PeftModel, sent: Mapping[str, Tensor], dtype: torch.dtype, *, algorithm: str | None = None
) -> dict[str, str]:
    """Return the digests that vLLM's copy of an adapter must have, by vLLM's names.

    vLLM rounds both matrices to its dtype, and multiplies the second by the adapter's scale.

    Args:
        model: the policy with the adapter.
        sent: the adapter's tensors by PEFT's names.
        dtype: vLLM's dtype.
        algorithm: of vLLM's device; default: that of each tensor's own.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    matrices = {}
    for name, tensor in sent.items():
        module, _, matrix = name.removesuffix(".weight").rpartition(".")
        value = tensor.detach().to(dtype)
        if matrix == "lora_B":
            value = value * layers[module].scaling[model.active_adapter]
        matrices[f"{module.removeprefix('base_model.model.')}.{matrix}"] = value
    return sync_digests(matrices, algorithm=algorithm)


def check_arrived(sent: Mapping[str, str], arrived: Mapping[str, str]) -> None:
    """Raise if the digests of the tensors that arrived are not those of the tensors that were sent.

    Raises:
        RolloutError: with the name of the first tensor that is missing, different or unexpected.
    """
    for name, expected in sent.items():
        if arrived.get(name) != expected:
            fault = "did not arrive" if name not in arrived else "arrived with another content"
            num_wrong = sum(arrived.get(n) != d for n, d in sent.items())
            raise RolloutError(
                f"the rollout engine's weights are not the policy's: tensor {name} {fault} ({num_wrong} of {len(sent)} "
                "tensors are wrong); no step was taken with them"
            )
    unexpected = sorted(set(arrived) - set(sent))
    if unexpected:
        raise RolloutError(
            f"the rollout engine's weights are not the policy's: tensor {unexpected[0]} arrived and was never sent; "
            "no step was taken with them"
        )


@torch.no_grad()
def compute_along(model: nn.Module) -> None:
    """Compute with two tokens, as part of a forward pass that other ranks need of weights that are spread."""
    device = next(model.parameters()).device
    tokens = torch.zeros(2, dtype=torch.long, device=device)
    policy = Policy(model)
    with evaluation_mode(policy.modules()):
        policy(tokens, Segments((2,), (-1,), (-1,), (0,), device), tokens.bool())


@torch.no_grad()
def trainer_logprobs(model: nn.Module, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Return the log-probs [tokens] of each completion, in order, by the trainer's forward pass at temperature 1.

    A mixture takes the experts that the engine recorded: another rounding makes it choose others, and then its
    log-probs differ by nats, whatever the weights.
    """
    num_tokens = sum(len(r.prompt.token_ids) + len(c.token_ids) for r in rollouts for c in r.completions)
    [pack] = pack_rollouts(rollouts, budget=num_tokens, share_prefix=False)
    pack = pack.to(next(model.parameters()).device)
    policy = Policy(model)
    with evaluation_mode(policy.modules()):
        logprobs = policy(pack.tokens, pack.segments, pack.completion_mask, routing=pack.routing).logprobs.cpu()
    lengths = [len(c.token_ids) for r in rollouts for c in r.completions]
    of_sequences = logprobs.split(pack.segments.lengths)
    return [values[len(values) - length :] for values, length in zip(of_sequences, lengths, strict=True)]


def canary_gap(model: nn.Module, rollouts: Sequence[Rollout]) -> CanaryGap:
    """Return the difference of the log-probs in `rollouts` from the trainer's.

    The rollouts must be sampled at temperature 1 and without truncation.
    """
    reported = torch.cat([torch.tensor(c.logprobs) for r in rollouts for c in r.completions])
    gaps = (torch.cat(trainer_logprobs(model, rollouts)) - reported).abs()
    return CanaryGap(float(gaps.mean()), float(gaps.max()), gaps.numel())


def default_gate(dtype: torch.dtype, *roundings: str | None) -> float:
    """Return the largest difference of a canary token's log-prob that is allowed, nats.

    Args:
        dtype: the policy's.
        roundings: of the engine's weights and of its cache; None: they are the policy's.
    """
    return GATES[dtype] if roundings.count(None) == len(roundings) else ROUNDED_GATE


def check_canary(gap: CanaryGap, gate: float) -> None:
    """Raise if a canary failed.

    Raises:
        RolloutError: a canary token's log-prob differs by more than `gate` nats, or is not a number.
    """
    if not gap.largest <= gate:
        raise RolloutError(
            f"the rollout engine does not compute what the policy computes: over {gap.num_tokens} canary tokens its "
            f"log-probs differ from the trainer's by up to {gap.largest:.3g} nats (mean {gap.mean:.3g}), and must by "
            f"at most {gate:g}; every tensor arrived intact, so the engine put one in a wrong place or uses an old "
            "copy; no step was taken with it"
        )
