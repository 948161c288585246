"""What online DPO is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignlab.config.trainers.online import OnlineConfig
from alignlab.config.trainers.pairs import PairLossConfig


class OnlineDPOConfig(PairLossConfig, OnlineConfig):
    """DPO on pairs of the policy's own completions, told apart by their rewards (arXiv:2402.04792)."""

    type: Literal["online_dpo"] = "online_dpo"
    group_size: int = Field(2, ge=2)
    """Completions a prompt; the best and the worst of them are the pair."""
    mask_truncated: bool = False
    """Leave completions cut off by the length limit out of the pairs."""

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return f"online dpo ({self.loss}, beta {self.beta:g})"
