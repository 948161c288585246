"""Measure a model's accuracy on held-out problems: greedy, sampled, and pass@k by the unbiased estimator.

The problems are a config's evaluation data, or those of a reasoning_gym task that training never sees. The last line
of standard output is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from alignlab.cli.policy import add_policy_arguments, add_sampling_arguments, load_policy, sampling_settings
from alignlab.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.config.data import DataSettings
    from alignlab.config.rewards import RewardSettings
    from alignlab.config.rollout import EngineSettings, SamplingSettings
    from alignlab.config.run import EvaluationSettings, RunConfig
    from alignlab.training.evaluation import EvaluationResult
    from alignlab.training.reward_functions import LoadedReward
    from alignlab.types import Prompt

NAME = "eval"
SUMMARY = "accuracy on held-out problems: greedy, sampled, pass@k"
EXAMPLE = (
    "alignlab eval smollm2-135m-instruct --adapter runs/grpo_smollm2_cpu/adapter "
    "--config configs/grpo_smollm2_cpu.yaml --num-samples 8 --pass-at 1 8"
)


class Plan(NamedTuple):
    """What to evaluate on, and how."""

    data: DataSettings
    scorer: RewardSettings
    sampling: SamplingSettings
    rollout: EngineSettings
    evaluation: EvaluationSettings
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="default: the config's model, or the adapter's base")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="CONFIG", help="evaluate as this run's config says")
    source.add_argument("--task", metavar="NAME", help="a reasoning_gym task, such as chain_sum")
    add_policy_arguments(parser)
    parser.add_argument("--set", metavar="key=value", action="append", default=[], help="override; repeatable")
    parser.add_argument("--system-prompt", metavar="TEXT", help="for --task")
    ways = ("last_number", "tagged", "whole")
    parser.add_argument("--extract", choices=ways, help="for --task: how the answer is taken from the text")
    parser.add_argument("--num-problems", type=int, metavar="N", help="default: all")
    parser.add_argument("--num-samples", type=int, metavar="N", help="sampled completions a problem")
    parser.add_argument("--pass-at", type=int, metavar="K", nargs="+", help="the k of pass@k")
    parser.add_argument("--seed", type=int, help="of the sampled completions")
    parser.add_argument("--show", type=int, metavar="N", default=0, help="show the completions of N problems")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    check_arguments(args)
    if args.config is not None:
        from alignlab.config.loader import load_config

        config = load_config(args.config, args.set)
        plan, model = plan_of_config(config, args), args.model or args.adapter or config.model.name
    else:
        plan, model = plan_of_task(args), args.model or args.adapter
    if model is None:
        raise ConfigError("no model to evaluate: give MODEL or --adapter; a config with an architecture has no weights")
    result = evaluate_policy(plan, model, args.adapter if model != args.adapter else None, args.dtype)
    show(result, args.show)
    numbers = {name.removeprefix("eval/"): round(value, 4) for name, value in result.metrics().items()}
    name = plan.data.task or plan.data.path
    print(json.dumps({"task": name, **numbers, "num_problems": result.num_problems, "num_samples": result.num_samples}))
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that would be ignored, or taken for others."""
    if args.model is not None and "=" in args.model:
        raise ConfigError(f"MODEL is {args.model!r}, which is a setting; write --set {args.model}")
    if args.config is not None and (args.system_prompt is not None or args.extract is not None):
        raise ConfigError("--system-prompt and --extract are for --task; with --config use --set data.system_prompt=X")


def plan_of_config(config: RunConfig, args: argparse.Namespace) -> Plan:
    """The evaluation that a run's config describes, with the command line's changes."""
    from alignlab.config.rewards import RewardSettings
    from alignlab.config.rollout import RolloutSettings, SamplingSettings
    from alignlab.config.trainers import OnlineConfig
    from alignlab.trainers.run import evaluation_data

    data = evaluation_data(config)
    if data is None:
        raise ConfigError(f"{args.config} has no evaluation data; set eval_data, or use --set eval_data.path=FILE")
    if config.evaluation.scorer is None and not config.rewards:
        raise ConfigError(f"{args.config} has nothing that scores; use --set evaluation.scorer=NAME")
    scorer = RewardSettings(name=config.evaluation.scorer) if config.evaluation.scorer else config.rewards[0]
    learns = isinstance(config.trainer, OnlineConfig)
    rollout = config.trainer.rollout if isinstance(config.trainer, OnlineConfig) else RolloutSettings()
    trained = config.trainer.sampling if isinstance(config.trainer, OnlineConfig) else SamplingSettings()
    base = config.evaluation.sampled or trained.model_copy(update={"temperature": 1.0} if learns else {})
    sampling = sampling_settings(args, **dict(base))
    seed = config.trainer.seed if args.seed is None else args.seed
    return Plan(data, scorer, sampling, rollout, _changed(config.evaluation, args), seed)


def plan_of_task(args: argparse.Namespace) -> Plan:
    """The evaluation of a reasoning_gym task, on the questions that training never sees."""
    from alignlab.config.data import DataSettings
    from alignlab.config.rewards import RewardSettings
    from alignlab.config.rollout import RolloutSettings
    from alignlab.config.run import EvaluationSettings

    if args.set:
        raise ConfigError(f"--set changes a config's settings, and there is no --config; remove --set {args.set[0]}")
    data = DataSettings(task=args.task, split="eval", size=args.num_problems, system_prompt=args.system_prompt)
    scorer = RewardSettings(name="reasoning_gym_answer", options={"extract": args.extract} if args.extract else {})
    evaluation = _changed(EvaluationSettings(), args)
    return Plan(data, scorer, sampling_settings(args), RolloutSettings(), evaluation, args.seed or 0)


def _changed(evaluation: EvaluationSettings, args: argparse.Namespace) -> EvaluationSettings:
    """The settings with --num-problems, --num-samples and --pass-at, checked again."""
    named = {"num_problems": args.num_problems, "num_samples": args.num_samples, "pass_at": args.pass_at}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return type(evaluation)(**{**dict(evaluation), **given})


def evaluate_policy(plan: Plan, model: str, adapter: str | None, dtype: str) -> EvaluationResult:
    """Load the policy, its problems and its scorer, and count."""
    from alignlab.data.prompts import load_prompts
    from alignlab.rollout.engines import make_engine
    from alignlab.training.evaluation import evaluate
    from alignlab.training.reward_functions import load_reward

    scorer = load_reward(plan.scorer)
    policy, tokenizer = load_policy(model, adapter, dtype)
    prompts = load_prompts(plan.data, tokenizer)
    refuse_deaf_scorer(scorer, prompts[0], tokenizer)
    return evaluate(
        make_engine(policy, tokenizer, plan.rollout),
        prompts[: plan.evaluation.num_problems],
        scorer,
        sampling=plan.sampling,
        num_samples=plan.evaluation.num_samples,
        seed=plan.seed,
        pass_at=plan.evaluation.pass_at,
    )


def refuse_deaf_scorer(scorer: LoadedReward, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say so where the scorer does not take a row's own answer for right: the accuracy would be 0 of anything.

    Raises:
        ConfigError: with what was tried.
    """
    from alignlab.cli.check import value_of_own_answer

    value = value_of_own_answer(scorer, prompt, tokenizer)
    if value is not None and value != 1.0:
        raise ConfigError(
            f"the scorer {scorer.name} gives {value} to the row's own answer {prompt.columns['answer']!r}, so nothing "
            "could be right; choose how the answer is taken (--extract whole, or the reward's option extract), or "
            "another scorer"
        )


def show(result: EvaluationResult, num_problems: int) -> None:
    """The numbers, and some completions, on standard error."""
    for problem in result.samples[:num_problems]:
        mark = "right" if problem.greedy_correct else "wrong"
        lines = [f"problem: {problem.prompt}", f"  answer: {problem.answer}", f"  greedy ({mark}): {problem.greedy}"]
        print("\n".join([*lines, *(f"  sampled: {text}" for text in problem.sampled)]), file=sys.stderr)
    print(f"{result.num_problems} problems, {result.num_samples} samples each", file=sys.stderr)
    for name, value in result.metrics().items():
        print(f"  {name.removeprefix('eval/'):15} {value:.3f}", file=sys.stderr)
