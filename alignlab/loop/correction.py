"""The correction of the gap between engine and trainer: its choice, its weights, and the tokens that it keeps."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.config.online import MISMATCH_BOUNDS, MismatchSettings
from alignlab.config.rollout import (
    EngineSettings,
    RolloutSettings,
    approximate_cache,
    max_staleness,
    quantization,
    served_cache,
)
from alignlab.functional.mismatch import mismatch_weights
from alignlab.functional.reduction import sequence_sum
from alignlab.types import Experience

_log = logging.getLogger(__name__)
_QUARTERS = ("first", "second", "third", "fourth")
_KEPT, _SHARE = "mismatch_kept_of/", "mismatch_share_of/"


@dataclass(frozen=True)
class Correction:
    """A correction of `functional.mismatch` with its bounds; "none" weighs every token 1."""

    name: str
    low: float | None = None
    high: float | None = None

    def weights(self, old_logprobs: Tensor, pack: Experience) -> Tensor:
        """Return the weight [N] of each token's policy-gradient loss."""
        mu = pack.rollout_logprobs
        assert mu is not None
        if self.name == "none":
            return torch.ones_like(old_logprobs)
        assert self.high is not None
        return mismatch_weights(
            self.name, old_logprobs, mu, mask=pack.completion_mask, sequence_ids=pack.segments.sequence_of_token,
            num_sequences=1 + max(pack.segments.sequence_ids), low=self.low or 0.0, high=self.high,
        )


def choose_correction(
    settings: MismatchSettings, rollout: EngineSettings, dtype: torch.dtype, *, sparse: bool
) -> Correction:
    """Return the correction that the settings name or, by default, the one that fits engine, precision and model."""
    name: str = settings.correction
    reason = "as configured"
    if name == "auto":
        name, reason = _fitting(rollout, dtype, sparse=sparse)
    usual_low, usual_high = MISMATCH_BOUNDS.get(name, (None, None))
    low = usual_low if settings.low is None else settings.low
    high = usual_high if settings.high is None else settings.high
    # A warning, which the command line shows: the user did not choose this correction, and it changes the loss.
    level = logging.WARNING if settings.correction == "auto" and name != "none" else logging.INFO
    _log.log(level, "mismatch correction: %s (%s), bounds %s to %s", name, reason, low, high)
    return Correction(name, low, high)


def _fitting(rollout: EngineSettings, dtype: torch.dtype, *, sparse: bool) -> tuple[str, str]:
    """Return the name of the correction that fits, and the reason."""
    behind = max_staleness(rollout)
    if behind:
        return "icepop" if sparse else "token_tis", f"tokens may come from weights that are {behind} updates old"
    cache = approximate_cache(rollout)
    if cache is not None and not cache.replay:
        return "icepop" if sparse else "token_tis", f"the engine's cache is {cache.type}, which is not replayed"
    form = quantization(rollout)
    if form is not None:
        return "icepop" if sparse else "token_tis", f"the engine computes in {form}, and the trainer does not"
    served = served_cache(rollout)
    if served is not None:
        return "icepop" if sparse else "token_tis", f"vLLM's cache is {served}, and the trainer's keys are exact"
    if isinstance(rollout, RolloutSettings):
        return "none", "the embedded engine computes the trainer's own layers"
    if dtype == torch.float32:
        return "none", "vLLM agrees with the trainer in float32"
    if sparse:
        return "icepop", f"in {dtype} vLLM's routers sometimes choose other experts than the trainer's"
    return "token_tis", f"in {dtype} vLLM rounds differently from the trainer"


def kept_by_length(weights: Tensor, pack: Experience, max_tokens: int) -> dict[str, Tensor]:
    """Return two masks [N] for each quarter of the length limit: tokens of completions that long, and those kept."""
    ids = pack.segments.sequence_of_token
    counts = sequence_sum(pack.completion_mask.float(), ids, num_sequences=1 + max(pack.segments.sequence_ids))
    lengths = counts.long()[ids.clamp(min=0)]
    quarter = ((lengths - 1) * len(_QUARTERS) // max_tokens).clamp(0, len(_QUARTERS) - 1)
    masks: dict[str, Tensor] = {}
    for number, name in enumerate(_QUARTERS):
        in_quarter = (quarter == number).float()
        masks |= {f"{_SHARE}{name}": in_quarter, f"{_KEPT}{name}": in_quarter * (weights > 0)}
    return masks


def kept_fractions(metrics: dict[str, float]) -> dict[str, float]:
    """Replace the means of `kept_by_length` in metrics by the kept fraction of each quarter that has tokens."""
    plain = {name: value for name, value in metrics.items() if not name.startswith((_KEPT, _SHARE))}
    for name in _QUARTERS:
        share = metrics.get(f"{_SHARE}{name}", 0.0)
        if share > 0:
            plain[f"mismatch_kept/{name}_quarter"] = metrics[f"{_KEPT}{name}"] / share
    return plain
