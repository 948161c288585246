"""Rollouts made by hand, and a judge whose model answers by a rule."""

from tests.runs.conftest import make_rollout
from tests.scoring.judges.conftest import make_judge

__all__ = ["make_judge", "make_rollout"]
