"""The part of `alignlab eval` for test-time strategies: --strategy, --pool."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.cli.candidates import Candidate
from alignlab.cli.policy import resolved_dtype
from alignlab.cli.pools import Sampler
from alignlab.errors import ConfigError

if TYPE_CHECKING:

    from alignlab.cli.evaluation_plan import Plan
    from alignlab.config.run import RunConfig
    from alignlab.evaluation.strategies.graded import AnswerReader, GradedProblem
    from alignlab.evaluation.strategies.measured import MeasuredStrategies
    from alignlab.evaluation.strategies.pool import Pool
    from alignlab.evaluation.strategies.settings import Strategy
    from alignlab.scoring.loading import LoadedReward
    from alignlab.types import Prompt


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

    def grade(self, pool: Pool, plan: Plan, *, by_rewards: bool = False) -> list[GradedProblem]:
        """Return the graded problems of a pool; `by_rewards`: with the scores of the rewards."""
        from alignlab.evaluation.strategies.graded import grade

        return grade(
            pool, self.scorer, rewards=self.rewards if by_rewards else {}, reader=self.reader,
            time_limit_s=plan.evaluation.scorer_time_limit_s,
        )


@dataclass(frozen=True)
class Work:
    """All that is measured, checked before anything is sampled.

    Attributes:
        plan: the problems and the sampling.
        strategies, ks: see `measure_strategies`.
        judges: what scores the samples.
        templates: of each strategy `augment`, by its place among the strategies, the forms of the prompt.
        dtype: of the weights.
        folder: of the pools; None keeps them in memory.
    """

    plan: Plan
    strategies: Sequence[Strategy]
    ks: Sequence[int]
    judges: Judges
    templates: Mapping[int, Sequence[str]]
    dtype: str
    folder: Path | None


def measure_models(
    plan: Plan, config: RunConfig | None, candidates: Sequence[Candidate], args: argparse.Namespace
) -> None:
    """Draw or read each model's pool, and report the strategies' figures."""
    work = prepare(plan, config, candidates, args)
    prompts = prompts_of(work, candidates)
    measured: list[MeasuredStrategies] = []
    try:
        for number, candidate in enumerate(candidates):
            measured.append(measure_model(work, candidate, prompts[number]))
    finally:
        if measured:
            report(plan, measured, {"dtype": work.dtype, "complete": len(measured) == len(candidates)}, args)


def prepare(
    plan: Plan, config: RunConfig | None, candidates: Sequence[Candidate], args: argparse.Namespace
) -> Work:
    """Read the strategies, and load what scores the samples.

    Raises:
        ConfigError: a strategy is unknown, a setting out of range, a reward or a file missing.
    """
    from alignlab.evaluation.strategies.measured import check_samples, powers_of_two

    strategies = _strategies_of(args.strategy)
    num_samples = plan.evaluation.num_samples
    if plan.sampling.temperature == 0:
        raise ConfigError("--temperature is 0, and must be above 0: all samples of a pool would be equal; use 1")
    ks = tuple(sorted(set(args.pass_at or powers_of_two(num_samples))))
    check_samples(strategies, ks, num_samples=num_samples)
    templates = _templates_of(strategies, ks, num_samples)
    dtype = resolved_dtype(args.dtype, adapted=any(candidate.adapted for candidate in candidates))
    return Work(plan, strategies, ks, load_judges(plan, config, strategies), templates, dtype, args.pool)


def _strategies_of(words: Sequence[str]) -> list[Strategy]:
    """Return the strategies that the command line names, each once."""
    from alignlab.evaluation.strategies.settings import parse_strategy

    strategies = [parse_strategy(word) for word in words]
    repeated = next((word for word in words if words.count(word) > 1), None)
    if repeated is not None:
        raise ConfigError(f"--strategy {repeated} is given twice; leave one out")
    return strategies


def _templates_of(strategies: Sequence[Strategy], ks: Sequence[int], num_samples: int) -> dict[int, Any]:
    """Return the forms of the prompt of each strategy `augment`, by its place."""
    from alignlab.evaluation.strategies.augment import read_templates
    from alignlab.evaluation.strategies.settings import Augment

    templates = {
        place: read_templates(strategy, num_samples)
        for place, strategy in enumerate(strategies) if isinstance(strategy, Augment)
    }  # fmt: skip
    for forms in templates.values():
        if not any(k % len(forms) == 0 for k in ks):
            raise ConfigError(
                f"--strategy augment: no k of {list(ks)} is a multiple of the {len(forms)} forms of the prompt, which "
                f"get equally many samples; use --pass-at {len(forms)}"
            )
    return templates


@dataclass(frozen=True)
class ModelPrompts:
    """The problems as one model reads them.

    Attributes:
        plain: as the data has them.
        in_forms: of each strategy `augment`, by its place, the prompts in each of its forms.
    """

    plain: Sequence[Prompt]
    in_forms: Mapping[int, Sequence[Sequence[Prompt]]]


def prompts_of(work: Work, candidates: Sequence[Candidate]) -> list[ModelPrompts]:
    """Return the problems as each model reads them, with room for the longest completion of any strategy.

    Raises:
        AlignlabError: a model cannot be given the problems, or there are too few for a strategy.
    """
    from alignlab.cli.evaluate import same_problems
    from alignlab.evaluation.strategies.augment import same_rows
    from alignlab.evaluation.strategies.budget import most_new_tokens
    from alignlab.evaluation.strategies.measured import check_problems
    from alignlab.evaluation.strategies.settings import Budget

    plan, scorer = work.plan, work.judges.scorer
    lengths = [most_new_tokens(strategy) for strategy in work.strategies if isinstance(strategy, Budget)]
    longest = max(plan.sampling.max_new_tokens, *lengths, 1)
    roomy = plan._replace(sampling=plan.sampling.model_copy(update={"max_new_tokens": longest}))
    plain = same_problems(roomy, candidates, scorer)
    check_problems(work.strategies, len(plain[0]))
    in_forms: list[dict[int, list[list[Prompt]]]] = [{} for _ in candidates]
    for place, templates in work.templates.items():
        for template in templates:
            data = plan.data.model_copy(update={"prompt_template": template})
            rendered = same_problems(plan._replace(data=data), candidates, scorer)
            for number, prompts in enumerate(rendered):
                in_forms[number].setdefault(place, []).append(same_rows(prompts, plain[number], template))
    check_reward_tokenizers(work.judges, candidates)
    return [ModelPrompts(*of_model) for of_model in zip(plain, in_forms, strict=True)]


def check_reward_tokenizers(judges: Judges, candidates: Sequence[Candidate]) -> None:
    """Raise if a reward model among the rewards has another tokenizer than a model whose samples it scores.

    Raises:
        ConfigError: with both names.
    """
    from alignlab.cli.policy import tokenizer_source
    from alignlab.models.hub.checkpoints import load_tokenizer
    from alignlab.scoring.reward_model import ModelReward

    for reward in judges.rewards.values():
        if isinstance(reward.function, ModelReward):
            for candidate in candidates:
                reward.function.check_tokenizer(load_tokenizer(tokenizer_source(candidate.model, candidate.adapter)))


def load_judges(plan: Plan, config: RunConfig | None, strategies: Sequence[Strategy]) -> Judges:
    """Load the scorer and the rewards that strategies name, and the scorer's way of reading answers.

    Raises:
        ConfigError: one cannot be loaded, or votes are to be counted and the scorer does not say how answers are read.
    """
    from alignlab.evaluation.evaluate import require_scorer
    from alignlab.evaluation.strategies.graded import AnswerReader
    from alignlab.evaluation.strategies.settings import LOGPROB, Weighted
    from alignlab.scoring.loading import load_reward
    from alignlab.scoring.reward_model import ModelReward

    scorer = load_reward(plan.scorer)
    require_scorer(scorer)
    reader = AnswerReader(scorer) if any(strategy.counts_votes for strategy in strategies) else None
    names = dict.fromkeys(strategy.reward_name for strategy in strategies)
    rewards = {name: load_named(name, config) for name in names if name not in (None, LOGPROB)}
    plain = [strategy.weight for strategy in strategies if isinstance(strategy, Weighted) and strategy.link == "value"]
    unfit = [name for name in plain if name in rewards and isinstance(rewards[name].function, ModelReward)]
    if unfit:
        raise ConfigError(
            f"--strategy weighted: weight is the reward model {unfit[0]}, whose scores may be below 0, and weights "
            "must not be; add link=sigmoid"
        )
    return Judges(scorer, rewards, reader)


def load_named(name: str, config: RunConfig | None) -> LoadedReward:
    """Load a reward that a strategy names: with its options, where the config has it; or the config's judge.

    Raises:
        ConfigError: there is no such reward, or no judge.
    """
    from alignlab.cli.judge import judge_of
    from alignlab.config.rewards import RewardSettings
    from alignlab.evaluation.strategies.settings import JUDGE
    from alignlab.scoring.judges.judge_rewards import RatingReward
    from alignlab.scoring.loading import LoadedReward, load_reward

    if name != JUDGE:
        given = [] if config is None else [reward for reward in config.rewards if reward.name == name]
        return load_reward(given[0] if given else RewardSettings(name=name))
    if config is None:
        raise ConfigError("--strategy names judge, and a judge is described by a config with trainer.type rlaif; give "
                          "--config, or another reward")  # fmt: skip
    return LoadedReward(JUDGE, RatingReward(judge_of(config)))


def measure_model(work: Work, candidate: Candidate, prompts: ModelPrompts) -> MeasuredStrategies:
    """Return one model's figures."""
    from alignlab.evaluation.strategies.augment import augment, joined
    from alignlab.evaluation.strategies.budget import budget_figure
    from alignlab.evaluation.strategies.measured import measure_strategies
    from alignlab.evaluation.strategies.settings import Augment, Budget

    sampler = Sampler(work.plan, candidate, work.dtype, work.folder, prompts.plain)
    try:
        problems = work.judges.grade(sampler.pool(prompts.plain), work.plan, by_rewards=True)
        measured = measure_strategies(candidate.name, problems, work.strategies, work.ks, seed=work.plan.seed)
        figures = list(measured.figures)
        for place, strategy in enumerate(work.strategies):
            if isinstance(strategy, Budget):
                for budget in strategy.budgets:
                    pool = sampler.budget_pool(prompts.plain, strategy, budget)
                    figures.append(budget_figure(work.judges.grade(pool, work.plan), budget))
            elif isinstance(strategy, Augment):
                forms = prompts.in_forms[place]
                pools = [
                    sampler.pool(of_form, form=template, num_samples=work.plan.evaluation.num_samples // len(forms))
                    for template, of_form in zip(work.templates[place], forms, strict=True)
                ]
                graded = work.judges.grade(joined(pools), work.plan)
                ks = [k for k in work.ks if k <= graded[0].num_samples]
                figures += augment(graded, len(forms), ks, work.plan.seed)
        return replace(measured, figures=tuple(figures))
    finally:
        sampler.close()


def report(
    plan: Plan, measured: Sequence[MeasuredStrategies], facts: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """Print the table on standard error, JSON on standard output, and draw the plot."""
    from rich.console import Console

    from alignlab.evaluation.strategies.report import plot_strategies, show_strategies
    from alignlab.evaluation.strategies.sharpening import describe_sharpening, sharpening

    show_strategies(Console(stderr=True), measured)
    changes = [sharpening(measured[0], later) for later in measured[1:]]
    for change in changes:
        print(describe_sharpening(change), file=sys.stderr)
    sizes = {"num_problems": len(measured[0].problems), "num_samples": measured[0].problems[0].num_samples}
    result: dict[str, Any] = {"task": plan.task, **sizes, "seed": plan.seed, **facts}
    result |= {"models": [of_model.to_json() for of_model in measured]}
    print(json.dumps(result | ({"sharpening": changes} if changes else {})), flush=True)
    if args.plot is not None:
        plot_strategies(measured, args.plot, title=plan.task)
        print(f"plot: {args.plot}", file=sys.stderr)
