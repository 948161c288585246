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
        outputs = learner.outputs(packs)
        packs = [replace(p, old_logprobs=o.logprobs) for p, o in zip(packs, outputs, strict=True)]
        if routing == "trainer":
            packs = [replace(p, routing=o.routing) for p, o in zip(packs, outputs, strict=True)]
    if "ref" in needs:
        assert reference is not None
        logprobs = reference.logprobs(packs)
        packs = [replace(p, ref_logprobs=values) for p, values in zip(packs, logprobs, strict=True)]
    return packs
