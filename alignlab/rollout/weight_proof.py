"""The proof that an engine runs on the trainer's weights: digests of what arrived, and log-probs of a canary.

Digests catch what is lost, stale, swapped or damaged on the way, to the bit and by name. What an engine then makes of a
tensor (packing, fusing, another layout) they cannot see: for that, the engine samples from a few prompts and the
trainer computes the log-probs of the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from alignlab.errors import RolloutError
from alignlab.models.policy import Policy
from alignlab.types import Rollout, Segments

GATES = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Nats by which any one token's log-prob may differ from the trainer's. A healthy engine stays under 5e-5 in float32
and 0.1 in bfloat16; weights that are wrong in one layer miss by more than a nat."""


@dataclass(frozen=True)
class CanaryGap:
    """How far an engine's log-probs are from the trainer's, over all canary tokens, nats."""

    mean: float
    largest: float
    num_tokens: int


def digest(tensor: Tensor) -> str:
    """128 bits of a tensor's dtype, shape and content."""
    plain = tensor.detach().contiguous().cpu()
    hasher = xxhash.xxh3_128(f"{plain.dtype}{tuple(plain.shape)}".encode())
    hasher.update(plain.view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digest of each tensor, by name."""
    return {name: digest(tensor) for name, tensor in tensors.items()}


def adapter_digests(model: PeftModel, sent: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Digests by name of what vLLM holds of the adapter: rounded to its dtype, the scale in the second matrix."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    expected = {}
    for name, tensor in sent.items():
        module, _, matrix = name.removesuffix(".weight").rpartition(".")
        value = tensor.detach().to(dtype)
        if matrix == "lora_B":
            value = value * layers[module].scaling[model.active_adapter]
        expected[f"{module.removeprefix('base_model.model.')}.{matrix}"] = digest(value)
    return expected


def check_arrived(sent: Mapping[str, str], arrived: Mapping[str, str]) -> None:
    """See that what arrived is what was sent, all of it and nothing else.

    Raises:
        RolloutError: with the first tensor that is missing, unknown or different.
    """
    for name, expected in sent.items():
        if arrived.get(name) != expected:
            what = "did not arrive" if name not in arrived else "arrived with another content"
            wrong = sum(arrived.get(n) != d for n, d in sent.items())
            raise RolloutError(
                f"the rollout engine's weights are not the policy's: tensor {name} {what} ({wrong} of {len(sent)} "
                "tensors are wrong); no step was taken with them"
            )
    unknown = sorted(set(arrived) - set(sent))
    if unknown:
        raise RolloutError(
            f"the rollout engine's weights are not the policy's: tensor {unknown[0]} arrived and was never sent; "
            "no step was taken with them"
        )


@torch.no_grad()
def trainer_logprobs(model: nn.Module, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Log-probs [tokens] of each completion, in order, by the trainer's own forward pass at temperature 1."""
    rows = [(list(r.prompt.token_ids), list(c.token_ids)) for r in rollouts for c in r.completions]
    lengths = tuple(len(prompt) + len(completion) for prompt, completion in rows)
    device = next(model.parameters()).device
    tokens = torch.tensor([token for row in rows for part in row for token in part], device=device)
    mask = torch.cat([torch.arange(len(p) + len(c)) >= len(p) for p, c in rows]).to(device)
    index = tuple(range(len(rows)))
    segments = Segments(lengths, (-1,) * len(rows), index, index, device)
    training = model.training
    model.eval()
    try:
        logprobs = Policy(model)(tokens, segments, mask).logprobs
    finally:
        model.train(training)
    return [part[len(prompt) :].cpu() for part, (prompt, _) in zip(logprobs.split(lengths), rows, strict=True)]


def canary_gap(model: nn.Module, rollouts: Sequence[Rollout]) -> CanaryGap:
    """How far the rollouts' own log-probs, sampled at temperature 1 and untruncated, are from the trainer's."""
    reported = torch.cat([torch.tensor(c.logprobs) for r in rollouts for c in r.completions])
    gaps = (torch.cat(trainer_logprobs(model, rollouts)) - reported).abs()
    return CanaryGap(float(gaps.mean()), float(gaps.max()), gaps.numel())


def check_canary(gap: CanaryGap, gate: float) -> None:
    """Raises:
    RolloutError: a canary token's log-prob is further off than the gate, or not a number.
    """
    if not gap.largest <= gate:
        raise RolloutError(
            f"the rollout engine does not compute what the policy computes: over {gap.num_tokens} canary tokens its "
            f"log-probs differ from the trainer's by up to {gap.largest:.3g} nats (mean {gap.mean:.3g}), and must by "
            f"at most {gate:g}; every tensor arrived whole, so the engine has put one in a wrong place or kept an old "
            "copy; no step was taken with it"
        )
