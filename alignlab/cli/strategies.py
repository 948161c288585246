"""The part of `alignlab eval` for test-time strategies: --strategy, --pool."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.cli.candidates import Candidate
from alignlab.cli.policy import load_policy, resolved_dtype
from alignlab.errors import ConfigError

if TYPE_CHECKING:
    from alignlab.cli.evaluate import Plan
    from alignlab.config.run import RunConfig
    from alignlab.config.strategies import Strategy
    from alignlab.evaluation.strategies.graded import AnswerReader
    from alignlab.evaluation.strategies.measured import MeasuredStrategies
    from alignlab.evaluation.strategies.pool import Pool
    from alignlab.scoring.loading import LoadedReward
    from alignlab.types import Prompt

POOL_FILE = "samples.jsonl"


def add_strategy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --strategy and --pool."""
    parser.add_argument(
        "--strategy", metavar="NAME[:key=value,...]", action="append", default=[],
        help="what k samples are worth: majority, best_of_n:reward=NAME, weighted[:weight=NAME], confidence, "
        "adaptive, calibrated, budget:budgets=[N,...], augment:templates=FILE; repeatable",
    )
    parser.add_argument(
        "--pool", metavar="FOLDER", type=Path,
        help="keep the samples here, and use those that are here; for --strategy",
    )


@dataclass(frozen=True)
class Judges:
    """What scores the samples.

    Attributes:
        scorer: decides which answers are right.
        rewards: by the name that strategies call them.
        reader: reads the answers; None if no strategy counts votes.
    """

    scorer: LoadedReward
    rewards: Mapping[str, LoadedReward]
    reader: AnswerReader | None


def measure_models(
    plan: Plan, config: RunConfig | None, candidates: Sequence[Candidate], args: argparse.Namespace
) -> None:
    """Draw or read each model's pool, and report the strategies' figures."""
    from alignlab.cli.evaluate import same_problems
    from alignlab.config.strategies import parse_strategy
    from alignlab.evaluation.strategies.measured import check_strategies, powers_of_two

    strategies = [parse_strategy(word) for word in args.strategy]
    num_samples = plan.evaluation.num_samples
    ks = plan.evaluation.pass_at if args.pass_at else powers_of_two(num_samples)
    judges = load_judges(plan, config, strategies)
    problems = same_problems(plan, candidates, judges.scorer)
    check_strategies(strategies, ks, num_samples=num_samples, num_problems=len(problems[0]))
    dtype = resolved_dtype(args.dtype, adapted=any(candidate.adapted for candidate in candidates))
    measured: list[MeasuredStrategies] = []
    try:
        for number, candidate in enumerate(candidates):
            measured.append(measure_model(plan, candidate, problems[number], judges, strategies, ks, dtype, args.pool))
    finally:
        if measured:
            report(plan, measured, {"dtype": dtype, "complete": len(measured) == len(candidates)}, args)


def load_judges(plan: Plan, config: RunConfig | None, strategies: Sequence[Strategy]) -> Judges:
    """Load the scorer and the rewards that strategies name, and the scorer's way of reading answers.

    Raises:
        ConfigError: one cannot be loaded, or votes are to be counted and the scorer does not say how answers are read.
    """
    from alignlab.config.strategies import LOGPROB
    from alignlab.evaluation.evaluate import require_scorer
    from alignlab.evaluation.strategies.graded import AnswerReader
    from alignlab.scoring.loading import load_reward

    scorer = load_reward(plan.scorer)
    require_scorer(scorer)
    reader = AnswerReader(scorer) if any(strategy.counts_votes for strategy in strategies) else None
    names = dict.fromkeys(strategy.reward_name for strategy in strategies)
    rewards = {name: load_named(name, config) for name in names if name not in (None, LOGPROB)}
    return Judges(scorer, rewards, reader)


def load_named(name: str, config: RunConfig | None) -> LoadedReward:
    """Load a reward that a strategy names: with its options, where the config has it; or the config's judge.

    Raises:
        ConfigError: there is no such reward, or no judge.
    """
    from alignlab.cli.judge import judge_of
    from alignlab.config.rewards import RewardSettings
    from alignlab.config.strategies import JUDGE
    from alignlab.scoring.judges.judge_rewards import RatingReward
    from alignlab.scoring.loading import LoadedReward, load_reward

    if name != JUDGE:
        given = [] if config is None else [reward for reward in config.rewards if reward.name == name]
        return load_reward(given[0] if given else RewardSettings(name=name))
    if config is None:
        raise ConfigError("--strategy names judge, and a judge is described by a config with trainer.type rlaif; give "
                          "--config, or another reward")  # fmt: skip
    return LoadedReward(JUDGE, RatingReward(judge_of(config)))


def measure_model(
    plan: Plan, candidate: Candidate, prompts: Sequence[Prompt], judges: Judges, strategies: Sequence[Strategy],
    ks: Sequence[int], dtype: str, folder: Path | None,
) -> MeasuredStrategies:
    """Return one model's figures."""
    from alignlab.evaluation.strategies.graded import grade
    from alignlab.evaluation.strategies.measured import measure_strategies

    pool = pool_of(plan, candidate, prompts, dtype, folder)
    problems = grade(
        pool, judges.scorer, rewards=judges.rewards, reader=judges.reader,
        time_limit_s=plan.evaluation.scorer_time_limit_s,
    )
    return measure_strategies(candidate.name, problems, strategies, ks, seed=plan.seed)


def pool_of(plan: Plan, candidate: Candidate, prompts: Sequence[Prompt], dtype: str, folder: Path | None) -> Pool:
    """Return a model's pool; the model is loaded only if samples are missing."""
    from alignlab.evaluation.strategies.graded import as_facts
    from alignlab.evaluation.strategies.pool import draw_pool
    from alignlab.rollout.engine import make_engine
    from alignlab.types import Rollout

    engines: list[Any] = []

    def draw(batch: Sequence[Prompt]) -> Sequence[Rollout]:
        if not engines:
            print(f"{candidate.name}: sampling, {dtype}", file=sys.stderr, flush=True)
            policy, tokenizer = load_policy(candidate.model, candidate.adapter, dtype)
            engines.append(make_engine(policy, tokenizer, plan.rollout))
        sampled: Sequence[Rollout] = engines[0].generate(
            batch, plan.sampling.params(n=plan.evaluation.num_samples, seed=plan.seed)
        )
        return sampled

    facts = as_facts(
        model=candidate.model, adapter=candidate.adapter, dtype=dtype, sampling=plan.sampling, seed=plan.seed,
        num_samples=plan.evaluation.num_samples, engine=plan.rollout.engine,
    )
    path = None if folder is None else folder / folder_name(candidate.name) / POOL_FILE
    try:
        return draw_pool(prompts, facts, draw, path)
    finally:
        for engine in engines:
            engine.close()


def folder_name(name: str) -> str:
    """Return a model's name as the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "model"


def report(
    plan: Plan, measured: Sequence[MeasuredStrategies], facts: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """Print the table on standard error, JSON on standard output, and draw the plot."""
    from rich.console import Console

    from alignlab.evaluation.strategies.report import plot_strategies, show_strategies

    show_strategies(Console(stderr=True), measured)
    sizes = {"num_problems": len(measured[0].problems), "num_samples": measured[0].problems[0].num_samples}
    result = {"task": plan.task, **sizes, "seed": plan.seed, **facts}
    print(json.dumps({**result, "models": [of_model.to_json() for of_model in measured]}), flush=True)
    if args.plot is not None:
        plot_strategies(measured, args.plot, title=plan.task)
        print(f"plot: {args.plot}", file=sys.stderr)
