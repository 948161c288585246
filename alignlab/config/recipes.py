"""The published members of GRPO's family, as combinations of an advantage, a surrogate and a reduction.

A recipe holds what differs from the defaults of `GRPOConfig`, which are those of GRPO itself. It says nothing of the
KL term, of group sizes or of learning rates: papers tune these to their model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# DAPO penalises the last 4,096 of 20,480 tokens.
OVERLONG_BUFFER_FRAC = 0.2

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Shao et al. (2024), arXiv:2402.03300, Eq. 3.
    "grpo": {},
    # Liu et al. (2025), arXiv:2503.20783: neither the group's deviation nor a length divides.
    "dr_grpo": {"advantage": "group_centered", "reduction": "constant"},
    # Yu et al. (2025), arXiv:2503.14476, Eqs. 8-13; its overlong buffer comes from the length limit.
    "dapo": {"reduction": "token_mean", "clip_high": 0.28, "dynamic_sampling": True},
    # Ahmadian et al. (2024), arXiv:2402.14740: REINFORCE on whole completions, so no length divides.
    "rloo": {"advantage": "leave_one_out", "surrogate": "reinforce", "reduction": "constant"},
    # Hu et al. (2025), arXiv:2501.03262v9, Eqs. 8-10: whitened over all tokens of the batch; the authors' code averages
    # over tokens. With a baseline (the paper's form for groups), the group's mean is taken off first.
    "reinforce_pp": {"advantage": "token_whitened", "reduction": "token_mean"},
    "reinforce_pp_baseline": {"advantage": "group_centered_whitened", "reduction": "token_mean"},
    # Zheng et al. (2025), arXiv:2507.18071, Sec. 5.1.
    "gspo": {"surrogate": "gspo_clip", "clip_low": 3e-4, "clip_high": 4e-4},
    # MiniMax (2025), arXiv:2506.13585; it publishes no bound: a ratio is capped at 5, as in arXiv:2510.13786.
    "cispo": {"surrogate": "cispo", "reduction": "token_mean", "clip_high": 4.0},
}


def fill_recipe(given: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """The settings given, with the recipe's for those that are not."""
    recipe = given.get("recipe", "grpo")
    filled = dict(RECIPES.get(recipe, {}))
    if recipe == "dapo":
        filled["overlong_buffer_tokens"] = max(1, round(OVERLONG_BUFFER_FRAC * max_new_tokens))
    return {**filled, **given}
