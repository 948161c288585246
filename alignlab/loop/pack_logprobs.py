"""Log-probs that packs need before the updates of a step, and the experts that a mixture replays in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from alignlab.loop.learner import Learner
from alignlab.loop.reference import Reference
from alignlab.types import Experience


def with_logprobs(
    packs: Sequence[Experience],
    needs: frozenset[str],
    learner: Learner,
    reference: Reference | None,
    *,
    routing: Literal["rollout", "trainer", "none"],
) -> list[Experience]:
    """Return the packs, on the learner's device, with the log-probs in `needs`.

    Args:
        needs: "old" (under the policy before its updates), "ref" (under the reference).
        reference: given where "ref" is needed.
        routing: whose expert choices the updates replay; see `Algorithm.routing`.
    """
    packs = [pack.to(learner.device) for pack in packs]
    if routing != "rollout":
        packs = [replace(pack, routing=None) for pack in packs]
    if "old" in needs:
        packs = _with_old_logprobs(packs, learner, take_routing=routing == "trainer")
    if "ref" in needs:
        assert reference is not None
        packs = reference.with_logprobs(packs)
    return packs


def _with_old_logprobs(packs: Sequence[Experience], learner: Learner, *, take_routing: bool) -> list[Experience]:
    """Return the packs with the policy's log-probs and, with `take_routing`, the experts that it chose for them."""
    scored = []
    for pack, output in zip(packs, learner.outputs(packs), strict=True):
        routing = output.routing if take_routing else pack.routing
        scored.append(replace(pack, old_logprobs=output.logprobs, routing=routing))
    return scored
