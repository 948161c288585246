"""Sample a teacher's completions of a config's training prompts, and keep those with a high reward, for fine-tuning.

The output is a JSONL file of prompts and completions, for `type: sft` with data.path. Run again, the same command
continues where it was interrupted. The last line of standard output is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.cli.places import new_file
from alignlab.cli.policy import add_policy_arguments, add_sampling_arguments, load_policy, sampling_settings
from alignlab.cli.pools import as_facts, engine_facts
from alignlab.errors import ConfigError

if TYPE_CHECKING:
    from alignlab.config.run import RunConfig
    from alignlab.synthesis.teacher_samples import SampleSettings

NAME = "sample"
SUMMARY = "sample a teacher's completions, filtered by rewards, as data for fine-tuning"
EXAMPLE = (
    "alignlab sample runs/grpo_tiny_moe_cpu/model --config configs/grpo_tiny_moe_cpu.yaml "
    "--output runs/samples.jsonl --num-samples 2 --min-reward 1"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="the teacher: a Hub id, a folder, a packaged model")
    parser.add_argument("--config", metavar="CONFIG", required=True, help="config with the data, rewards and sampling")
    parser.add_argument("--output", metavar="FILE", required=True, help="a new .jsonl file")
    add_policy_arguments(parser)
    parser.add_argument(
        "--set", metavar="key=value", action="append", default=[], help="override of a setting; repeatable"
    )
    parser.add_argument("--num-prompts", type=int, metavar="N", help="number of prompts; default: all")
    parser.add_argument("--num-samples", type=int, metavar="N", help="completions a prompt")
    parser.add_argument(
        "--min-reward", type=float, metavar="X", help="lowest reward of a completion that is kept; default: none"
    )
    parser.add_argument(
        "--keep", choices=("all", "best"), default="all",
        help="all completions that reach --min-reward, or the best one of each prompt",
    )
    parser.add_argument(
        "--prompts-at-once", type=int, metavar="N", help="prompts that are sampled together, then written to disk"
    )
    parser.add_argument("--seed", type=int, help="seed of the sampling; default: the config's")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Sample, filter, write."""
    from alignlab.config.loader import load_config

    config = load_config(args.config, args.set)
    check_arguments(args)
    output = new_file(args.output, "--output")
    settings = settings_of(config, args)
    settings.check(len(config.rewards))

    from alignlab.config.rewards import RewardLimits
    from alignlab.config.rollout import RolloutSettings
    from alignlab.data.prompts import load_prompts
    from alignlab.data.rendering import PromptRenderer
    from alignlab.loop.preflight import SampledBy, with_room
    from alignlab.models.fingerprints import model_fingerprint
    from alignlab.models.kv_approximation.choice import measure_cache
    from alignlab.rollout.engine import make_engine
    from alignlab.scoring.columns import check_columns, reward_columns
    from alignlab.scoring.loading import load_reward
    from alignlab.scoring.reward_model import bind_rewards
    from alignlab.scoring.runner import RewardRunner
    from alignlab.synthesis.teacher_samples import describe_rejected, sample_teacher

    trainer = config.online_stage
    limits = trainer.reward_limits if trainer else RewardLimits()
    rewards = RewardRunner([load_reward(settings) for settings in config.rewards], limits)
    policy, tokenizer = load_policy(args.model, args.adapter, args.dtype)
    rollout = trainer.rollout if trainer else RolloutSettings()
    prompts = with_room(
        load_prompts(config.data, tokenizer)[: args.num_prompts], policy, SampledBy(settings.sampling, rollout),
        config.data.rendering, tokenizer=tokenizer,
    )
    check_columns(rewards.rewards, prompts, data="the training data")
    rewards.columns = reward_columns(prompts)
    identity = {
        "model": model_fingerprint(policy),
        **as_facts(**engine_facts(rollout, prompts)),
        "data": config.data.model_dump_json(),
        "rewards": [reward.model_dump_json() for reward in config.rewards],
    }
    bind_rewards(rewards.rewards, policy, tokenizer, share=True)
    measure_cache(policy, rollout, prompts)
    try:
        counts = sample_teacher(
            make_engine(policy, tokenizer, rollout),
            prompts, rewards, PromptRenderer(config.data.rendering, tokenizer), output, settings, identity=identity,
        )
    finally:
        rewards.close()
    plain = bool(tokenizer.chat_template) and config.data.chat is False
    print(f"alignlab sample: left out: {describe_rejected(counts)}", file=sys.stderr)
    day = config.data.template_date
    dated = "" if day == type(config.data).model_fields["template_date"].default else f" data.template_date={day}"
    print(f"fine-tune on it: data.path={output}{' data.chat=false' if plain else ''}{dated}", file=sys.stderr)
    share = round(counts["kept"] / counts["completions"], 4)
    print(json.dumps({"output": str(output), "kept_frac": share, **counts}))
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse an impossible output file or number of prompts."""
    if Path(args.output).suffix != ".jsonl":
        raise ConfigError(f"--output is {args.output}, and must end in .jsonl; rename it")
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ConfigError(f"--num-prompts is {args.num_prompts}, and must be at least 1; use 1 or more")


def settings_of(config: RunConfig, args: argparse.Namespace) -> SampleSettings:
    """Return the settings of the config, replaced by flags."""
    from alignlab.config.rollout import SamplingSettings
    from alignlab.synthesis.teacher_samples import SampleSettings

    trained = config.online_stage.sampling if config.online_stage else SamplingSettings()
    named = {"num_samples": args.num_samples, "prompts_at_once": args.prompts_at_once}
    return SampleSettings(
        sampling_settings(args, **dict(trained)),
        min_reward=args.min_reward,
        keep=args.keep,
        seed=config.trainer.seed if args.seed is None else args.seed,
        **{name: value for name, value in named.items() if value is not None},
    )
