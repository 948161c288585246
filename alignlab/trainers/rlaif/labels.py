"""The stage in which the judge labels pairs of the policy's completions.

labels/
    rank*.jsonl          all judged pairs
    preferences.jsonl    the labelled pairs: prompt, chosen, rejected, probability
    report.json          how far the labels can be trusted
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from alignlab.config.rlaif import LabelSettings
from alignlab.errors import DataError
from alignlab.files.atomic_files import write_atomically
from alignlab.scoring.judges.judge import count_earlier_questions
from alignlab.synthesis.labels import counts_of_rows, judge_pairs, label_report, preferences
from alignlab.trainers.rlaif.sampling import SampledRows
from alignlab.trainers.rlaif.stage import Progress, StageContext


class LabelStage:
    """AI preferences: two completions of each prompt, and which of them the judge prefers."""

    name = "labels"

    def __init__(self, context: StageContext, settings: LabelSettings) -> None:
        self._context, self._settings = context, settings
        self._sampled = SampledRows(context, settings, self.folder / "preferences.jsonl", "AI preferences")

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self._context.folder / self.name

    def finished(self) -> bool:
        """Return whether the labelled pairs are on the disk."""
        return self._sampled.finished()

    def run(self, progress: Progress) -> Progress:
        """Sample and label pairs; see `Stage.run`."""
        context, min_confidence = self._context, self._settings.min_confidence
        judge = context.judge_beside(progress.policy)
        count_earlier_questions(judge, counts_of_rows(self._sampled.rows_of_this_rank()))
        rows = self._sampled.make(
            progress.policy, partial(judge_pairs, judge, work=context.run_name), group_size=2
        )
        report = label_report(rows, counts_of_rows(rows), min_confidence=min_confidence)
        context.questions.update(report.counts)
        context.show("AI preferences", report.lines())
        pairs = preferences(rows, min_confidence=min_confidence)
        if not pairs:
            raise DataError(
                f"the judge preferred no completion of {report.num_pairs} pairs ({dict(report.outcomes)}); lower "
                "labels.min_confidence, sample at a higher temperature, or choose another judge, in another output_dir "
                "(the answers of a judge to the same questions are stored, and not asked for again)"
            )
        self._sampled.publish(pairs)
        if context.is_main_rank:
            write_atomically(self.folder / "report.json", json.dumps(report.to_json(), indent=1) + "\n")
        return replace(progress, preferences=pairs)
