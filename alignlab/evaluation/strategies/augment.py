"""Votes over several forms of the prompt, which the user writes.

Reference: self-consistency over paraphrased prompts, as in Zhou et al. (2022), arXiv:2211.01910, and over re-ordered
ones, Lu et al. (2021), arXiv:2104.08786.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from alignlab.errors import ConfigError, DataError
from alignlab.evaluation.strategies.figures import MAX_SUBSETS, Estimate, Figure, estimate_of
from alignlab.evaluation.strategies.graded import GradedProblem
from alignlab.evaluation.strategies.pool import Pool
from alignlab.evaluation.strategies.settings import Augment
from alignlab.evaluation.strategies.voting import tokens_of, weighted_value
from alignlab.files.input_files import MAX_SETTINGS_BYTES, read_limited
from alignlab.types import Prompt, Rollout

MIN_TEMPLATES = 2


def read_templates(settings: Augment, num_samples: int) -> list[str]:
    """Return the forms of the prompt in the strategy's file.

    Raises:
        ConfigError: the file cannot be read, has fewer than two forms or one without {prompt}, or there are fewer
            samples than forms.
    """
    lines = read_limited(settings.templates, MAX_SETTINGS_BYTES, ConfigError).splitlines()
    templates = [line.replace("\\n", "\n") for line in lines if line.strip()]
    bad = next((template for template in templates if "{prompt}" not in template), None)
    if bad is not None:
        raise ConfigError(f"{settings.templates}: each line must contain {{prompt}}, and one is {bad!r:.80}; put it in")
    if len(templates) < MIN_TEMPLATES or len(set(templates)) < len(templates):
        raise ConfigError(
            f"{settings.templates} must hold at least {MIN_TEMPLATES} different forms of the prompt, a line each, and "
            f"has {len(set(templates))} in {len(templates)} lines; add one, or use --strategy majority"
        )
    if num_samples < len(templates):
        raise ConfigError(
            f"--num-samples is {num_samples}, and must be at least the {len(templates)} forms of the prompt in "
            f"{settings.templates}; raise it"
        )
    return templates


def same_rows(prompts: Sequence[Prompt], problems: Sequence[Prompt], template: str) -> list[Prompt]:
    """Return a template's prompts of the given problems, in their order.

    Raises:
        DataError: one is missing, since its prompt has no room.
    """
    by_index = {prompt.index: prompt for prompt in prompts}
    missing = [problem.index for problem in problems if problem.index not in by_index]
    if missing:
        raise DataError(
            f"the form {template!r:.80} of the prompt leaves out row {missing[0]}, which has no room in it; shorten "
            "it, or raise data.max_prompt_tokens"
        )
    return [by_index[problem.index] for problem in problems]


def joined(pools: Sequence[Pool]) -> Pool:
    """Return one pool in which each problem has the samples of all forms, form after form."""
    rollouts = tuple(
        Rollout(of_problem[0].prompt, tuple(c for rollout in of_problem for c in rollout.completions))
        for of_problem in zip(*(pool.rollouts for pool in pools), strict=True)
    )
    return Pool(pools[0].facts, rollouts)


def augment(
    problems: Sequence[GradedProblem], num_templates: int, ks: Sequence[int], seed: int
) -> list[Figure]:
    """Return the accuracy of the majority of k samples, k / num_templates of each form.

    Args:
        problems: with the samples of all forms, form after form, equally many of each.
        num_templates: number of forms.
        ks: those that are multiples of it count.
        seed: of the subsets.
    """
    return [
        Figure.of(
            "augment", k, [_estimate(problem, num_templates, k // num_templates, seed) for problem in problems],
            tokens_of(problems, k),
        )
        for k in ks if k % num_templates == 0
    ]  # fmt: skip


def _estimate(problem: GradedProblem, num_templates: int, of_each: int, seed: int) -> Estimate:
    size = problem.num_samples // num_templates
    forms = [range(form * size, (form + 1) * size) for form in range(num_templates)]
    if of_each == size:
        return Estimate(_majority(problem, range(problem.num_samples)))
    generator = random.Random(seed)
    subsets = ([i for form in forms for i in generator.sample(form, of_each)] for _ in range(MAX_SUBSETS))
    return estimate_of([_majority(problem, subset) for subset in subsets])


def _majority(problem: GradedProblem, samples: Sequence[int]) -> float:
    return weighted_value(problem, samples, [1.0] * len(samples))
