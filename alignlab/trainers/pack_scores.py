"""Scoring packs before the updates of a step: log-probs of the policy and the reference, and experts to be replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from alignlab.models.policy import Policy
from alignlab.trainers.learner import Learner
from alignlab.trainers.objective import Objective
from alignlab.types import Experience


def score_packs(
    packs: Sequence[Experience], needs: frozenset[str], learner: Learner, objective: Objective, reference: Policy | None
) -> list[Experience]:
    """Return the packs, on the learner's device, with the log-probs that are needed.

    Args:
        needs: of "old" and "ref"; see `Objective.needs`.
        reference: a frozen copy; None for the base of the policy's adapter.
    """
    scored = [pack.to(learner.device) for pack in packs]
    if objective.routing != "rollout":
        scored = [replace(pack, routing=None) for pack in scored]
    if "old" in needs:
        outputs = learner.outputs(scored)
        scored = [replace(p, old_logprobs=o.logprobs) for p, o in zip(scored, outputs, strict=True)]
        if objective.routing == "trainer":
            scored = [replace(p, routing=o.routing) for p, o in zip(scored, outputs, strict=True)]
    if "ref" not in needs:
        return scored
    free = [replace(pack, routing=None) for pack in scored]  # the reference chooses its own experts
    scores = learner.score_reference(free, reference)
    return [replace(pack, ref_logprobs=score) for pack, score in zip(scored, scores, strict=True)]
