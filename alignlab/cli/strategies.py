"""The part of `alignlab eval` for test-time strategies: --strategy, --pool."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.cli.candidates import Candidate
from alignlab.cli.policy import load_policy, resolved_dtype
from alignlab.errors import ConfigError
from alignlab.files.digests import fast_digest, fast_digest_of_file, sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignlab.cli.evaluation_plan import Plan
    from alignlab.config.run import RunConfig
    from alignlab.evaluation.strategies.graded import AnswerReader, GradedProblem
    from alignlab.evaluation.strategies.measured import MeasuredStrategies
    from alignlab.evaluation.strategies.pool import Pool
    from alignlab.evaluation.strategies.settings import Budget, Strategy
    from alignlab.rollout.engine import RolloutEngine
    from alignlab.scoring.loading import LoadedReward
    from alignlab.types import Prompt, Rollout

Draw = Callable[["RolloutEngine", "PreTrainedTokenizerBase", Sequence["Prompt"]], Sequence["Rollout"]]


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
    from alignlab.evaluation.strategies.augment import read_templates
    from alignlab.evaluation.strategies.measured import check_samples, powers_of_two
    from alignlab.evaluation.strategies.settings import Augment, parse_strategy

    strategies = [parse_strategy(word) for word in args.strategy]
    repeated = next((word for word in args.strategy if args.strategy.count(word) > 1), None)
    if repeated is not None:
        raise ConfigError(f"--strategy {repeated} is given twice; leave one out")
    num_samples = plan.evaluation.num_samples
    if plan.sampling.temperature == 0:
        raise ConfigError("--temperature is 0, and must be above 0: all samples of a pool would be equal; use 1")
    ks = tuple(sorted(set(args.pass_at or powers_of_two(num_samples))))
    check_samples(strategies, ks, num_samples=num_samples)
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
    dtype = resolved_dtype(args.dtype, adapted=any(candidate.adapted for candidate in candidates))
    return Work(plan, strategies, ks, load_judges(plan, config, strategies), templates, dtype, args.pool)


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
    from alignlab.evaluation.strategies.settings import LOGPROB
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

    sampler = Sampler(work, candidate)
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


class Sampler:
    """Draws pools from one model, which is loaded when samples are missing.

    Args:
        work: the settings of the sampling.
        candidate: the model.
    """

    def __init__(self, work: Work, candidate: Candidate) -> None:
        self._work, self._candidate = work, candidate
        self._engine: RolloutEngine | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._weights = {
            name: weights_digest(place)
            for name, place in (("model", candidate.model), ("adapter", candidate.adapter)) if place is not None
        }  # fmt: skip

    def pool(self, prompts: Sequence[Prompt], *, form: str | None = None, num_samples: int | None = None) -> Pool:
        """Return plain samples of prompts; `form` is the template that they are rendered with, if any."""
        plan = self._work.plan
        count = num_samples or plan.evaluation.num_samples
        return self._pool(
            prompts, "samples" if form is None else f"form-{sha256_of(form)[:12]}",
            lambda engine, _, batch: engine.generate(batch, plan.sampling.params(n=count, seed=plan.seed)),
            form=form, num_samples=count,
        )  # fmt: skip

    def budget_pool(self, prompts: Sequence[Prompt], strategy: Budget, budget: int) -> Pool:
        """Return traces of a budget of thinking."""
        from alignlab.evaluation.strategies.budget import BudgetForcing

        plan = self._work.plan
        settings = strategy.model_copy(update={"budgets": (budget,)})
        return self._pool(
            prompts, f"budget-{sha256_of(settings.model_dump_json())[:12]}",
            lambda engine, tokenizer, batch: BudgetForcing(
                engine, tokenizer, plan.sampling, settings, plan.seed
            ).generate(batch, budget),
            budget=settings,
        )

    def _pool(self, prompts: Sequence[Prompt], name: str, draw: Draw, **how: Any) -> Pool:
        from alignlab.evaluation.strategies.pool import draw_pool

        work, plan = self._work, self._work.plan
        facts = as_facts(
            **self._weights, dtype=work.dtype, sampling=plan.sampling, seed=plan.seed, engine=plan.rollout.engine, **how
        )
        file = None if work.folder is None else work.folder / folder_name(self._candidate.name) / f"{name}.jsonl"
        return draw_pool(prompts, facts, lambda batch: draw(*self._loaded(), batch), file)

    def _loaded(self) -> tuple[RolloutEngine, PreTrainedTokenizerBase]:
        from alignlab.rollout.engine import make_engine

        if self._engine is None or self._tokenizer is None:
            candidate = self._candidate
            print(f"{candidate.name}: sampling, {self._work.dtype}", file=sys.stderr, flush=True)
            policy, self._tokenizer = load_policy(candidate.model, candidate.adapter, self._work.dtype)
            self._engine = make_engine(policy, self._tokenizer, self._work.plan.rollout)
        return self._engine, self._tokenizer

    def close(self) -> None:
        """Free the model and the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def as_facts(**facts: Any) -> dict[str, Any]:
    """Return what samples depend on as JSON; facts that are None are left out."""
    return {
        name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for name, value in facts.items() if value is not None
    }  # fmt: skip


def weights_digest(place: str) -> dict[str, str]:
    """Return the place of a model or an adapter, and a digest of the files of a local one."""
    files = [file for end in ("*.safetensors", "*config.json") for file in sorted(Path(place).glob(end))]
    digests = fast_digest(f"{file.name} {fast_digest_of_file(file)}\n" for file in files)
    return {"place": place} | ({"files": digests} if files else {})


def folder_name(name: str) -> str:
    """Return a model's name as the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "model"


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
