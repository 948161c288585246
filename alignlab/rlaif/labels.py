"""Preferences labelled by a judge, and how far its labels can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from alignlab.data.messages import template_columns
from alignlab.rlaif.collecting import as_json
from alignlab.rlaif.judge import Judge, PromptedJudge, Verdict
from alignlab.types import Rollout


@dataclass(frozen=True)
class LabelReport:
    """What became of the pairs that a judge was shown.

    Attributes:
        num_pairs: that were sampled.
        outcomes: of pairs: labelled, tie, unanswered, identical, empty.
        agreement: judgements whose two orders prefer the same completion, in [0, 1]; None without one in both orders.
        first_rate: how often the completion shown first is preferred, in [0, 1]; 0.5 without a position bias.
        confidence: mean probability of the preferred completion among labelled pairs.
        counts: of questions that the rows took, see `counts_of_rows`.
    """

    num_pairs: int
    outcomes: Mapping[str, int]
    agreement: float | None
    first_rate: float | None
    confidence: float | None
    counts: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Names and values, to be shown."""
        numbers = {
            "both orders agree": self.agreement,
            "first one preferred": self.first_rate,
            "mean confidence": self.confidence,
        }
        shown = [(name, "no answers" if value is None else f"{value:.3f}") for name, value in numbers.items()]
        outcomes = [(name, str(count)) for name, count in sorted(self.outcomes.items())]
        asked = [(f"questions {name}", str(count)) for name, count in sorted(self.counts.items()) if count]
        return [("pairs", str(self.num_pairs)), *outcomes, *shown, *asked]


def judge_pairs(judge: Judge, rollouts: Sequence[Rollout], *, work: str = "") -> list[dict[str, Any]]:
    """A row for the first two completions of each prompt: both texts, and what the judge makes of them.

    Args:
        work: names the run, for counts that are the same whether or not it is killed; see `PromptedJudge`.

    Returns:
        Rows with index, prompt, first, second, probability (that the first is better; None without an answer),
        by_order, and outcome: judged, unanswered, identical or empty; what the prompt's chat template was given; and
        counts of the questions about it. What the judge does not tell of each pair is counted with the last one.
    """
    rows = [_row(rollout) for rollout in rollouts]
    shown = [row for row in rows if row["outcome"] == "judged"]
    before = Counter(judge.counts)
    pairs = [(row["prompt"], row["first"], row["second"]) for row in shown]
    if work and isinstance(judge, PromptedJudge):
        verdicts = judge.compare(pairs, work=[f"{work}/{row['index']}" for row in shown])
    else:
        verdicts = judge.compare(pairs)
    for row, verdict in zip(shown, verdicts, strict=True):
        row |= {"probability": verdict.probability, "by_order": [list(both) for both in verdict.by_order]}
        row["outcome"] = "judged" if verdict.probability is not None else "unanswered"
        row["counts"] = dict(verdict.counts)
    if shown:
        untold = judge.counts - before - counts_of_rows(shown)
        shown[-1]["counts"] = dict(Counter(shown[-1]["counts"]) + untold)
    return rows


def counts_of_rows(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """What became of the questions that the rows took, whichever start, on whichever rank, has made each; zeros left
    out. Questions whose rows a killed run did not keep are counted with the rows that are made anew, as asked, be their
    answers on disk or not. Rows of earlier versions have no counts."""
    return sum((Counter(row.get("counts", {})) for row in rows), Counter[str]())


def _row(rollout: Rollout) -> dict[str, Any]:
    first, second = (completion.text for completion in rollout.completions[:2])
    outcome = "judged"
    if not first.strip() or not second.strip():
        outcome = "empty"
    elif first == second:
        outcome = "identical"
    return {
        "index": rollout.prompt.index,
        "prompt": as_json(rollout.prompt.text),
        **template_columns(rollout.prompt.columns),
        "first": first,
        "second": second,
        "probability": None,
        "by_order": [],
        "outcome": outcome,
        "counts": {},
    }


def preferences(rows: Sequence[Mapping[str, Any]], *, min_confidence: float) -> list[dict[str, Any]]:
    """Rows of preferences from judged ones: prompt, chosen, rejected, and how probably the chosen one is better; with
    what the prompt's chat template was given.

    Args:
        min_confidence: a pair whose better completion is less probable is a tie and left out, in [0.5, 1).
    """
    found = []
    for row in rows:
        if _outcome(row, min_confidence) != "labelled":
            continue
        first_is_better = row["probability"] > 0.5
        chosen, rejected = (row["first"], row["second"]) if first_is_better else (row["second"], row["first"])
        probability = row["probability"] if first_is_better else 1 - row["probability"]
        pair = {"chosen": chosen, "rejected": rejected, "probability": probability}
        found.append({"prompt": row["prompt"], **template_columns(row), **pair})
    return found


def report(
    rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int], *, min_confidence: float
) -> LabelReport:
    """What the judged rows come to."""
    labelled = preferences(rows, min_confidence=min_confidence)
    agreement, first_rate = bias([Verdict(None, tuple(map(tuple, row["by_order"]))) for row in rows])
    return LabelReport(
        num_pairs=len(rows),
        outcomes=dict(Counter(_outcome(row, min_confidence) for row in rows)),
        agreement=agreement,
        first_rate=first_rate,
        confidence=fmean(row["probability"] for row in labelled) if labelled else None,
        counts=dict(counts),
    )


def bias(verdicts: Sequence[Verdict]) -> tuple[float | None, float | None]:
    """(agreement, first_rate) of `LabelReport`; a question that leaves it open counts half for each side."""
    both = [(one, other) for verdict in verdicts for one, other in verdict.by_order if None not in (one, other)]
    known: list[tuple[float, float]] = both  # type: ignore[assignment]  # None was left out
    if not known:
        return None, None
    # `one` is p(better) of a completion shown first, `other` of the same completion shown second.
    agreement = fmean(_half(one) == _half(other) for one, other in known)
    first_rate = fmean((_half(one) + (1 - _half(other))) / 2 for one, other in known)
    return agreement, first_rate


def _half(probability: float) -> float:
    """1 above one half, 0 below, one half between."""
    return 0.5 if probability == 0.5 else float(probability > 0.5)


def _outcome(row: Mapping[str, Any], min_confidence: float) -> str:
    if row["outcome"] != "judged":
        return str(row["outcome"])
    p = row["probability"]
    return "tie" if p == 0.5 or max(p, 1 - p) < min_confidence else "labelled"
