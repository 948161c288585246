"""Rollouts made by hand."""

from tests.runs.conftest import make_rollout

__all__ = ["make_rollout"]
