"""Comparison of several policies on the same problems: which differences from the first policy exceed chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from alignlab.errors import RewardError
from alignlab.evaluation.accuracy_intervals import accuracy_intervals
from alignlab.evaluation.drawing import new_figure, save_figure
from alignlab.evaluation.results import EvaluatedProblem, EvaluationResult
from alignlab.evaluation.tables import completions_table, describe_judged, spaced_indices
from alignlab.functional.estimation import mcnemar_exact, mcnemar_interval, paired_bootstrap, sign_flip_test

LEVEL = 0.95
DIGITS = 4
MAX_WIDTH = 400


@dataclass(frozen=True)
class MeasuredPolicy:
    """One policy and its result.

    Attributes:
        name: distinct name of the policy.
        model: a Hub id, a packaged model, or the folder of a model or an adapter.
        result: its result on the problems of all policies.
        num_parameters: parameters of the policy, with those of its adapter.
        seconds: time that answering and scoring took.
    """

    name: str
    model: str
    result: EvaluationResult
    num_parameters: int
    seconds: float

    @property
    def tokens_per_s(self) -> float | None:
        """Completion tokens a second, over the time of answering and scoring; None if tokens were not counted."""
        result = self.result
        if result.greedy_tokens is None or result.sampled_tokens is None:
            return None
        tokens = result.num_problems * (result.greedy_tokens + result.num_samples * result.sampled_tokens)
        return tokens / self.seconds


class Change(NamedTuple):
    """A difference, the bounds of its 95 % interval, and the p-value of the test that there is no difference."""

    value: float
    low: float
    high: float
    p_value: float

    @property
    def exceeds_chance(self) -> bool:
        """True if the test rejects chance."""
        return self.p_value < 1 - LEVEL

    def to_json(self) -> dict[str, float | bool]:
        """Return the rounded numbers, by name."""
        rounded = {name: round(value, DIGITS) for name, value in self._asdict().items()}
        return rounded | {"exceeds_chance": self.exceeds_chance}


@dataclass(frozen=True)
class Difference:
    """Difference of a policy's accuracy from the first policy's.

    Attributes:
        greedy: difference of greedy accuracies, with the exact McNemar test and its interval.
        sampled: difference of sampled accuracies, with the sign-flip test and the paired bootstrap's interval over
            problems.
        num_gained, num_lost: problems that only this policy, or only the first one, answers right greedily.
    """

    greedy: Change
    sampled: Change
    num_gained: int
    num_lost: int

    def to_json(self) -> dict[str, Any]:
        """Return the difference as JSON."""
        counts = {"num_gained": self.num_gained, "num_lost": self.num_lost}
        return {"greedy": self.greedy.to_json(), "sampled": self.sampled.to_json(), **counts}


def difference(first: EvaluationResult, second: EvaluationResult) -> Difference:
    """Return the difference of two results, over the problems that are judged in both.

    Args:
        first, second: results on the same problems with the same number of samples.

    Raises:
        RewardError: the scorer applies to no problem in both results.
    """
    pairs = _judged_pairs(first, second)
    num_gained = sum(bool(b.greedy_correct) and not a.greedy_correct for a, b in pairs)
    num_lost = sum(bool(a.greedy_correct) and not b.greedy_correct for a, b in pairs)
    sampled = [(b.num_correct - a.num_correct) / first.num_samples for a, b in pairs]
    interval = mcnemar_interval(num_gained, num_lost, len(pairs), level=LEVEL)
    greedy = Change((num_gained - num_lost) / len(pairs), *interval, mcnemar_exact(num_gained, num_lost))
    change = Change(fmean(sampled), *paired_bootstrap(sampled, level=LEVEL), sign_flip_test(sampled))
    return Difference(greedy, change, num_gained, num_lost)


def _judged_pairs(
    first: EvaluationResult, second: EvaluationResult
) -> list[tuple[EvaluatedProblem, EvaluatedProblem]]:
    """Return the two policies' entries of each problem that is judged for both."""
    pairs = list(zip(first.samples, second.samples, strict=True))
    assert first.num_samples == second.num_samples and all(a.prompt == b.prompt for a, b in pairs)
    pairs = [(a, b) for a, b in pairs if a.greedy_correct is not None and b.greedy_correct is not None]
    if not pairs:
        raise RewardError("the scorer applies to no problem for both of two models; choose another evaluation.scorer")
    return pairs


def differences(policies: Sequence[MeasuredPolicy]) -> list[Difference | None]:
    """Return each policy's difference from the first policy; None for the first."""
    first, *later = (policy.result for policy in policies)
    return [None, *(difference(first, result) for result in later)]


def comparison_json(policies: Sequence[MeasuredPolicy]) -> list[dict[str, Any]]:
    """Return one entry a policy, in order; `difference` is null for the first."""
    entries = []
    for policy, change in zip(policies, differences(policies), strict=True):
        numbers: dict[str, float | None] = {
            **policy.result.metrics(),
            "greedy_tokens": policy.result.greedy_tokens,
            "sampled_tokens": policy.result.sampled_tokens,
            "tokens_per_s": policy.tokens_per_s,
        }
        entries.append(
            {
                "name": policy.name,
                "model": policy.model,
                **{name.removeprefix("eval/"): value and round(value, DIGITS) for name, value in numbers.items()},
                "intervals": {
                    name: [round(bound, DIGITS) for bound in bounds]
                    for name, bounds in accuracy_intervals(policy.result).items()
                },
                "num_parameters": policy.num_parameters,
                "difference": change and change.to_json(),
            }
        )
    return entries


def show_comparison(console: Console, policies: Sequence[MeasuredPolicy], num_shown: int) -> None:
    """Show some completions side by side, and the table; widen a console that is too narrow for the table's numbers."""
    table = comparison_table(policies)
    needed = Measurement.get(console, console.options.update(max_width=MAX_WIDTH), table).minimum
    console.width = max(console.width, needed)
    if num_shown and len(policies) > 1:
        console.print(disagreements_table(policies, num_shown))
    console.print(table)


def comparison_table(policies: Sequence[MeasuredPolicy]) -> Table:
    """Return a table of one row a policy; under each accuracy, its difference from the first and the interval."""
    first = policies[0].result
    passes = [k for k in first.pass_at if k > 1]
    caption = (
        f"Under an accuracy of {policies[0].name}: its {LEVEL:.0%} interval; of others: the difference from "
        f"{policies[0].name}, and the difference's interval. "
        f"* exceeds chance, p < {1 - LEVEL:.2f}, each by itself. Greedy: exact McNemar test; sampled: sign flips, "
        "bootstrap interval, both over problems."
    )
    table = Table(
        title=f"{describe_judged(first)} problems, {first.num_samples} samples each",
        caption=Text(caption), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
    )
    table.add_column("model", overflow="fold", min_width=8)
    for column in ("greedy", "sampled", *(f"pass@{k}" for k in passes), "strict", "tokens", "weights"):
        table.add_column(column, justify="right", no_wrap=True)
    for policy, change in zip(policies, differences(policies), strict=True):
        result, intervals = policy.result, accuracy_intervals(policy.result)
        table.add_row(
            Text(policy.name),
            _accuracy(result.greedy, None if change is None else change.greedy, intervals.get("greedy")),
            _accuracy(result.sampled, None if change is None else change.sampled, intervals.get("sampled")),
            *(_number(result.pass_at[k], ".3f") for k in passes),
            _number(result.strict_greedy, ".3f"),
            _number(result.sampled_tokens, ".1f"),
            _count(policy.num_parameters),
        )
    return table


def _accuracy(value: float, change: Change | None, interval: tuple[float, float] | None) -> Text:
    """Return a cell of the table: the accuracy, its difference from the first, and the difference's interval; of the
    first, the accuracy's own interval."""
    text = Text(f"{value:.3f}")
    if change is None:
        return text if interval is None else text.append(f"\n{interval[0]:.2f}..{interval[1]:.2f}", style="dim")
    style = ("green" if change.value > 0 else "red") if change.exceeds_chance else ""
    text.append(f"\n{change.value:+.3f}{'*' if change.exceeds_chance else ''}", style=style)
    return text.append(f"\n{change.low:+.2f}..{change.high:+.2f}", style="dim")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _count(number: int) -> str:
    """Return a number of weights in thousands, millions or billions, such as 1.5B."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def disagreements(policies: Sequence[MeasuredPolicy]) -> list[int]:
    """Return the indices of the problems that some policies answer right and others wrong, greedily."""
    verdicts = zip(*([p.greedy_correct for p in policy.result.samples] for policy in policies), strict=True)
    return [i for i, of_problem in enumerate(verdicts) if len(set(of_problem) - {None}) > 1]


def disagreements_table(policies: Sequence[MeasuredPolicy], count: int) -> Table:
    """Return a table of greedy completions of at most `count` problems on which the policies disagree."""
    indices = disagreements(policies)
    rows = [indices[i] for i in spaced_indices(len(indices), count)]
    problems: dict[str, Sequence[EvaluatedProblem]] = {policy.name: policy.result.samples for policy in policies}
    title = f"{len(rows)} of {len(indices)} problems that some models answer right and others wrong"
    return completions_table(problems, rows, title=title)


def plot_comparison(policies: Sequence[MeasuredPolicy], png: Path) -> None:
    """Draw the accuracies of each policy, and the differences from the first with their intervals."""
    names, height = [policy.name for policy in policies], 0.38
    figure = new_figure(11, 1.6 + 0.7 * len(policies))
    accuracy, change = figure.subplots(1, 2, sharey=True)
    for offset, kind, colour in ((-height / 2, "greedy", "tab:red"), (height / 2, "sampled", "tab:orange")):
        places = [i + offset for i in range(len(policies))]
        accuracy.barh(places, [getattr(p.result, kind) for p in policies], height, label=kind, color=colour)
        for place, from_first in zip(places, differences(policies), strict=True):
            if from_first is not None:
                interval: Change = getattr(from_first, kind)
                change.plot((interval.low, interval.high), (place, place), color=colour, linewidth=2)
                change.plot(interval.value, place, "o", color=colour)
    accuracy.set(xlim=(0, 1), xlabel="fraction right", title=f"{policies[0].result.num_problems} problems")
    accuracy.set_yticks(range(len(names)), names)
    accuracy.invert_yaxis()
    accuracy.legend(fontsize=8)
    change.axvline(0, color="black", linewidth=1, linestyle="--")
    change.set(xlabel="difference", title=f"Difference from {names[0]}, {LEVEL:.0%} interval")
    for axis in (accuracy, change):
        axis.grid(alpha=0.3)
    save_figure(figure, png)
