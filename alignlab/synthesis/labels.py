"""Preferences labelled by a judge, and measures of how far its labels can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from alignlab.data.chat.tool_calls import template_columns
from alignlab.scoring.judges.judge import Judge, PromptedJudge, Verdict
from alignlab.synthesis.prompt_journal import prompt_json
from alignlab.types import Rollout


@dataclass(frozen=True)
class LabelReport:
    """Summary of the pairs that a judge was shown.

    Attributes:
        num_pairs: sampled pairs.
        outcomes: pairs by outcome: labelled, tie, unanswered, identical, empty.
        agreement: share of judgements whose two orders prefer the same completion, in [0, 1]; None if no pair was
            judged in both orders.
        first_rate: share of judgements that prefer the completion shown first, in [0, 1]; 0.5 without position bias.
        confidence: mean probability of the preferred completion over labelled pairs.
        counts: questions by outcome, see `counts_of_rows`.
    """

    num_pairs: int
    outcomes: Mapping[str, int]
    agreement: float | None
    first_rate: float | None
    confidence: float | None
    counts: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Return names and values to be shown."""
        fractions = {
            "both orders agree": self.agreement,
            "first one preferred": self.first_rate,
            "mean confidence": self.confidence,
        }
        shares = [(name, "no answers" if value is None else f"{value:.3f}") for name, value in fractions.items()]
        outcomes = [(name, str(count)) for name, count in sorted(self.outcomes.items())]
        questions = [(f"questions {name}", str(count)) for name, count in sorted(self.counts.items()) if count]
        return [("pairs", str(self.num_pairs)), *outcomes, *shares, *questions]


def judge_pairs(judge: Judge, rollouts: Sequence[Rollout], *, work: str = "") -> list[dict[str, Any]]:
    """Ask a judge about the first two completions of each prompt, and return a row for each.

    Args:
        judge: the judge.
        rollouts: prompts with at least two completions.
        work: name of the run, so that a killed and resumed run counts the same questions; see `PromptedJudge`.

    Returns:
        Rows with index, prompt, what the prompt's chat template was given, first, second, probability (that the first
        is better; None without an answer), by_order, outcome (judged, unanswered, identical, empty) and counts (of the
        questions about the pair). Counts that the judge does not give by pair are added to the last judged row.
    """
    rows = [_row(rollout) for rollout in rollouts]
    to_judge = [row for row in rows if row["outcome"] == "judged"]
    before = Counter(judge.counts)
    for row, verdict in zip(to_judge, _compare(judge, to_judge, work), strict=True):
        row |= {"probability": verdict.probability, "by_order": [list(orders) for orders in verdict.by_order]}
        row["outcome"] = "judged" if verdict.probability is not None else "unanswered"
        row["counts"] = dict(verdict.counts)
    if to_judge:
        without_pair = judge.counts - before - counts_of_rows(to_judge)
        to_judge[-1]["counts"] = dict(Counter(to_judge[-1]["counts"]) + without_pair)
    return rows


def _compare(judge: Judge, rows: Sequence[Mapping[str, Any]], work: str) -> list[Verdict]:
    pairs = [(row["prompt"], row["first"], row["second"]) for row in rows]
    if work and isinstance(judge, PromptedJudge):
        return judge.compare(pairs, work=[f"{work}/{row['index']}" for row in rows])
    return judge.compare(pairs)


def counts_of_rows(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Return the questions that the rows took, by outcome, on all ranks and in all starts; zeros are left out.

    A row that a killed run had not kept is made again and counts its questions as asked, even where their answers are
    on the disk. Rows of earlier versions have no counts.
    """
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
        "prompt": prompt_json(rollout.prompt.text),
        **template_columns(rollout.prompt.columns),
        "first": first,
        "second": second,
        "probability": None,
        "by_order": [],
        "outcome": outcome,
        "counts": {},
    }


def preferences(rows: Sequence[Mapping[str, Any]], *, min_confidence: float) -> list[dict[str, Any]]:
    """Return preference rows made of judged rows.

    Args:
        rows: as `judge_pairs` returns them.
        min_confidence: a pair whose better completion is less probably better is a tie and left out, in [0.5, 1).

    Returns:
        Rows with prompt, what its chat template was given, chosen, rejected, and probability (that the chosen one is
        better).
    """
    labelled = []
    for row in rows:
        if _outcome(row, min_confidence) != "labelled":
            continue
        first_is_better = row["probability"] > 0.5
        chosen, rejected = (row["first"], row["second"]) if first_is_better else (row["second"], row["first"])
        probability = row["probability"] if first_is_better else 1 - row["probability"]
        pair = {"chosen": chosen, "rejected": rejected, "probability": probability}
        labelled.append({"prompt": row["prompt"], **template_columns(row), **pair})
    return labelled


def label_report(
    rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int], *, min_confidence: float
) -> LabelReport:
    """Return the summary of judged rows."""
    labelled = preferences(rows, min_confidence=min_confidence)
    agreement, first_rate = position_bias([Verdict(None, tuple(map(tuple, row["by_order"]))) for row in rows])
    return LabelReport(
        num_pairs=len(rows),
        outcomes=dict(Counter(_outcome(row, min_confidence) for row in rows)),
        agreement=agreement,
        first_rate=first_rate,
        confidence=fmean(row["probability"] for row in labelled) if labelled else None,
        counts=dict(counts),
    )


def position_bias(verdicts: Sequence[Verdict]) -> tuple[float | None, float | None]:
    """Return (agreement, first_rate), see `LabelReport`; an undecided judgement counts half for each completion."""
    orders = list(_answered_orders(verdicts))
    if not orders:
        return None, None
    # Both probabilities are of the same completion: once it was shown first, once second.
    agreement = fmean(_preference(first) == _preference(second) for first, second in orders)
    first_rate = fmean((_preference(first) + 1 - _preference(second)) / 2 for first, second in orders)
    return agreement, first_rate


def _answered_orders(verdicts: Sequence[Verdict]) -> Iterator[tuple[float, float]]:
    for verdict in verdicts:
        for shown_first, shown_second in verdict.by_order:
            if shown_first is not None and shown_second is not None:
                yield shown_first, shown_second


def _preference(probability: float) -> float:
    """Return 1 for a probability above one half, 0 below, and one half between."""
    return 0.5 if probability == 0.5 else float(probability > 0.5)


def _outcome(row: Mapping[str, Any], min_confidence: float) -> str:
    if row["outcome"] != "judged":
        return str(row["outcome"])
    probability = row["probability"]
    return "tie" if probability == 0.5 or max(probability, 1 - probability) < min_confidence else "labelled"
