"""The rules between the fields of trainers that learn from rollouts.

A `check_` function checks one rule, and raises BrokenRule with the reason. A `doubt_` function returns a sentence on a
combination of settings that runs and is hardly meant, with what to use instead, or None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignlab.config.messages import BrokenRule
from alignlab.config.rollout import max_staleness

if TYPE_CHECKING:
    from alignlab.config.trainers import GRPOConfig, OnlineConfig, OnPolicyDistillConfig, PolicyGradientConfig

# A sequence's ratio is a mean over its tokens and stays within about 1e-3 of 1: a wider clip never acts.
MAX_GSPO_CLIP = 0.05

MAX_VLLM_TEMPERATURE = 2.0

# Choices of GRPO's `advantage` that give each token its own.
TOKEN_ADVANTAGES = ("token_whitened", "group_centered_whitened")

# Those that compare a completion with all others of the step, and not with its group's.
STEP_ADVANTAGES = ("batch_whitened", "token_whitened")

# Corrections whose weight is an importance ratio, and no mere mask.
IMPORTANCE_WEIGHTS = ("token_tis", "icepop", "sequence_tis", "sequence_mis")

# Fields that a surrogate does not read; a value that is not the default would be ignored in silence.
IGNORED_BY = {
    "reinforce": ("clip_low", "clip_high", "dual_clip"),
    "cispo": ("clip_low", "dual_clip"),
    "gspo_clip": ("dual_clip",),
    "ppo_clip": (),
}


def check_minibatches(config: OnlineConfig) -> None:
    """Mini-batches are cut between groups, and must be equal."""
    prompts, parts = config.num_prompts, config.num_minibatches
    if prompts % parts:
        multiples = [n for n in (prompts // parts * parts, (prompts // parts + 1) * parts) if n]
        fix = f"use {' or '.join(str(n) for n in multiples)}"
        raise BrokenRule("num_prompts", prompts, f"be a multiple of num_minibatches ({parts})", fix)


def check_gspo_clip(config: GRPOConfig) -> None:
    """A token's clip never acts on a sequence's ratio."""
    if config.surrogate != "gspo_clip":
        return
    for name in ("clip_low", "clip_high"):
        value = getattr(config, name)
        if value > MAX_GSPO_CLIP:
            must = f"be at most {MAX_GSPO_CLIP} with gspo_clip: it clips a mean over a sequence, and this never acts"
            raise BrokenRule(name, value, must, "use recipe: gspo, or clip_low 3e-4 and clip_high 4e-4")


def check_ignored_fields(config: GRPOConfig | OnPolicyDistillConfig) -> None:
    """A field that the surrogate does not read keeps its default."""
    for name in IGNORED_BY[config.surrogate]:
        value, default = getattr(config, name), type(config).model_fields[name].default
        if value != default:
            default = "null" if default is None else default
            must = f"stay {default} with surrogate {config.surrogate}, which does not read it"
            raise BrokenRule(name, value, must, f"remove {name}, or use surrogate: ppo_clip")


def check_on_policy(config: GRPOConfig | OnPolicyDistillConfig) -> None:
    """The plain policy gradient has no ratio, so it is right for one update a batch only."""
    updates = config.num_epochs * config.num_minibatches
    if config.surrogate == "reinforce" and updates > 1:
        name = "num_epochs" if config.num_epochs > 1 else "num_minibatches"
        must = "be 1 with surrogate reinforce, which has no ratio to correct later, off-policy updates"
        raise BrokenRule(name, getattr(config, name), must, f"use {name} 1, or surrogate: ppo_clip")


def check_overlong(config: GRPOConfig) -> None:
    """The overlong penalty starts inside the length limit."""
    buffer, limit = config.overlong_buffer_tokens, config.sampling.max_new_tokens
    if buffer is not None and buffer >= limit:
        fix = f"use {max(1, limit // 5)}, or null for no penalty" if limit > 1 else "use null for no penalty"
        raise BrokenRule("overlong_buffer_tokens", buffer, f"be less than sampling.max_new_tokens ({limit})", fix)


def check_temperature(config: OnlineConfig) -> None:
    """Greedy completions of one prompt are all equal."""
    if config.sampling.temperature == 0:
        must = "be above 0: greedy completions of a prompt are identical, and nothing is explored"
        raise BrokenRule("sampling.temperature", config.sampling.temperature, must, "use 1.0")


def check_engine_temperature(config: OnlineConfig) -> None:
    """vLLM refuses more than 2."""
    temperature = config.sampling.temperature
    if config.rollout.engine != "embedded" and temperature > MAX_VLLM_TEMPERATURE:
        engine = config.rollout.engine
        must = f"be at most {MAX_VLLM_TEMPERATURE:g} with rollout.engine {engine}: vLLM samples no hotter"
        raise BrokenRule("sampling.temperature", temperature, must, "lower it, or use rollout.engine: embedded")


def check_routing_replay(config: PolicyGradientConfig) -> None:
    """With one update a batch, what the trainer would choose before it is what it chooses in it."""
    if config.routing_replay == "trainer" and config.num_epochs * config.num_minibatches == 1:
        must = "be rollout or none where a batch has one update: the trainer's own choices are then as they are"
        raise BrokenRule("routing_replay", config.routing_replay, must, "use rollout, or num_minibatches 2 or more")


def check_staleness(config: PolicyGradientConfig) -> None:
    """Tokens of older weights are weighted by how likely the policy is to sample them now, and not only left out where
    that is far off (the decoupled objective, arXiv:2505.24298, Eq. 5)."""
    behind, correction = max_staleness(config.rollout), config.mismatch.correction
    if behind and correction not in ("auto", *IMPORTANCE_WEIGHTS):
        known = f"{', '.join(IMPORTANCE_WEIGHTS[:-1])} or {IMPORTANCE_WEIGHTS[-1]}"
        must = f"be {known} with rollout.max_staleness {behind}: tokens of older weights must be weighted"
        raise BrokenRule("mismatch.correction", correction, must, "use auto, or rollout.max_staleness 0")


def check_kl_horizon(config: PolicyGradientConfig) -> None:
    """A step of more completions than the horizon would move the coefficient past 20 %, and even below 0."""
    num_completions = config.num_prompts * config.group_size
    if config.kl.target is not None and config.kl.horizon < num_completions:
        must = f"be at least the step's {num_completions} completions (num_prompts x group_size)"
        raise BrokenRule("kl.horizon", config.kl.horizon, must, f"use {num_completions} or more")


def check_overlong_penalty(config: GRPOConfig) -> None:
    """The penalty needs a buffer to be applied in."""
    default = type(config).model_fields["overlong_penalty"].default
    if config.overlong_buffer_tokens is None and config.overlong_penalty != default:
        must = f"stay {default} without overlong_buffer_tokens, where nothing is penalised"
        raise BrokenRule("overlong_penalty", config.overlong_penalty, must, "give overlong_buffer_tokens")


def doubt_gspo_reduction(config: GRPOConfig) -> str | None:
    """GSPO's objective is a mean over sequences; a sum over tokens weighs a sequence's ratio by its length."""
    if config.surrogate != "gspo_clip" or config.reduction == "sequence_mean":
        return None
    return (
        f"reduction is {config.reduction} with surrogate gspo_clip, whose loss is the same on all tokens of a "
        "sequence: each sequence weighs its length, where GSPO (arXiv:2507.18071, Eq. 5) weighs all alike; "
        "use reduction: sequence_mean, or surrogate: ppo_clip"
    )


def doubt_gspo_token_advantages(config: GRPOConfig) -> str | None:
    """One ratio a sequence has one gradient a sequence: advantages that vary inside it are averaged away."""
    varies = config.advantage in TOKEN_ADVANTAGES and config.kl.placement == "reward" and config.kl.coef > 0
    if config.surrogate != "gspo_clip" or not varies:
        return None
    return (
        f"surrogate is gspo_clip with advantage {config.advantage} and kl.placement reward: each token has an "
        "advantage of its own, and one ratio a sequence gives all of them the gradient of their mean; "
        "use surrogate: ppo_clip, or kl.placement: loss"
    )


def doubt_dynamic_sampling(config: GRPOConfig) -> str | None:
    """Where the baseline is the batch's, a group of equal rewards teaches as much as others."""
    if not config.dynamic_sampling or config.advantage not in STEP_ADVANTAGES:
        return None
    return (
        f"dynamic_sampling is true with advantage {config.advantage}, whose baseline is the whole batch's: it drops "
        "groups whose rewards are all equal, and these differ from the batch and would be learnt from; "
        "use dynamic_sampling: false, or advantage: group_centered_whitened"
    )


ONLINE_RULES = (check_minibatches, check_temperature, check_engine_temperature)
POLICY_GRADIENT_RULES = (check_staleness, check_routing_replay, check_kl_horizon)
GRPO_RULES = (
    check_gspo_clip,
    check_ignored_fields,
    check_on_policy,
    check_overlong,
    check_overlong_penalty,
)
GRPO_DOUBTS = (doubt_gspo_reduction, doubt_gspo_token_advantages, doubt_dynamic_sampling)
