"""Which correction of the engine's gap a run uses, its weights, and what it keeps of short and of long completions."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.config.rollout import EngineSettings, RolloutSettings, max_staleness
from alignlab.config.trainers.online import MISMATCH_BOUNDS, MismatchSettings
from alignlab.functional import mismatch
from alignlab.functional.reduction import sequence_sum
from alignlab.types import Experience

_log = logging.getLogger(__name__)
_PARTS = ("first", "second", "third", "fourth")
_KEPT, _SHARE = "mismatch_kept_of/", "mismatch_share_of/"


_BY_TOKEN = {"icepop": mismatch.icepop, "token_mask": mismatch.token_mask}
_BY_SEQUENCE = {
    "sequence_mis": mismatch.sequence_mis,
    "sequence_mask": mismatch.sequence_mask,
    "geometric_mis": mismatch.geometric_mis,
    "geometric_mask": mismatch.geometric_mask,
}


@dataclass(frozen=True)
class Correction:
    """A correction of `functional.mismatch` with its bounds; "none" weighs every token 1."""

    name: str
    low: float | None = None
    high: float | None = None

    def weights(self, old_logprobs: Tensor, pack: Experience) -> Tensor:
        """Weight [N] of each token's policy-gradient loss."""
        mu = pack.rollout_logprobs
        assert mu is not None
        if self.name == "none":
            return torch.ones_like(old_logprobs)
        assert self.high is not None
        if self.name == "token_tis":
            return mismatch.token_tis(old_logprobs, mu, cap=self.high)
        ids, count = pack.segments.sequence_of_token, 1 + max(pack.segments.sequence_ids)
        if self.name == "sequence_tis":
            return mismatch.sequence_tis(
                old_logprobs, mu, mask=pack.completion_mask, sequence_ids=ids, num_sequences=count, cap=self.high
            )
        assert self.low is not None
        if self.name in _BY_TOKEN:
            return _BY_TOKEN[self.name](old_logprobs, mu, low=self.low, high=self.high)
        return _BY_SEQUENCE[self.name](
            old_logprobs, mu, mask=pack.completion_mask, sequence_ids=ids, num_sequences=count,
            low=self.low, high=self.high,
        )


def choose_correction(
    settings: MismatchSettings, rollout: EngineSettings, dtype: torch.dtype, *, sparse: bool
) -> Correction:
    """The correction that the settings name or, by default, the one that fits engine, precision and model."""
    name: str = settings.correction
    reason = "as configured"
    if name == "auto":
        name, reason = _fitting(rollout, dtype, sparse=sparse)
    usual_low, usual_high = MISMATCH_BOUNDS.get(name, (None, None))
    low = usual_low if settings.low is None else settings.low
    high = usual_high if settings.high is None else settings.high
    # What the user did not choose and what changes the loss is shown at the level that the command prints.
    level = logging.WARNING if settings.correction == "auto" and name != "none" else logging.INFO
    _log.log(level, "mismatch correction: %s (%s), bounds %s to %s", name, reason, low, high)
    return Correction(name, low, high)


def _fitting(rollout: EngineSettings, dtype: torch.dtype, *, sparse: bool) -> tuple[str, str]:
    """Name of the correction that fits, and why."""
    behind = max_staleness(rollout)
    if behind:
        return "icepop" if sparse else "token_tis", f"tokens may be from weights {behind} updates old"
    if isinstance(rollout, RolloutSettings):
        return "none", "the embedded engine runs the trainer's own layers"
    if dtype == torch.float32:
        return "none", "vLLM agrees with the trainer in float32"
    if sparse:
        return "icepop", f"vLLM's routers choose other experts now and then in {dtype}"
    return "token_tis", f"vLLM rounds otherwise than the trainer in {dtype}"


def kept_by_length(weights: Tensor, pack: Experience, max_tokens: int) -> dict[str, Tensor]:
    """For each quarter of the length limit, [N]: which tokens are in completions that long, and which of them count."""
    ids = pack.segments.sequence_of_token
    counts = sequence_sum(pack.completion_mask.float(), ids, num_sequences=1 + max(pack.segments.sequence_ids))
    lengths = counts.long()[ids.clamp(min=0)]
    quarter = ((lengths - 1) * len(_PARTS) // max_tokens).clamp(0, len(_PARTS) - 1)
    found: dict[str, Tensor] = {}
    for number, part in enumerate(_PARTS):
        here = (quarter == number).float()
        found |= {f"{_SHARE}{part}": here, f"{_KEPT}{part}": here * (weights > 0)}
    return found


def kept_fractions(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics in which the means of `kept_by_length` have become the kept fraction of each quarter that has tokens."""
    plain = {name: value for name, value in metrics.items() if not name.startswith((_KEPT, _SHARE))}
    for part in _PARTS:
        share = metrics.get(f"{_SHARE}{part}", 0.0)
        if share > 0:
            plain[f"mismatch_kept/{part}_quarter"] = metrics[f"{_KEPT}{part}"] / share
    return plain
