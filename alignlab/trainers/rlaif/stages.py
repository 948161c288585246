"""The stages of a run, in order."""

from __future__ import annotations

from collections.abc import Iterator

from alignlab.trainers.rlaif.labels import LabelStage
from alignlab.trainers.rlaif.policy import PolicyStage
from alignlab.trainers.rlaif.revision import RevisionStage
from alignlab.trainers.rlaif.reward import RewardStage
from alignlab.trainers.rlaif.stage import Stage, StageContext


def stages_of(context: StageContext) -> Iterator[Stage]:
    """Yield the stages that a run's config names, in order."""
    config = context.config
    if config.revision is not None:
        yield RevisionStage(context, config.revision)
    if config.labels is not None:
        yield LabelStage(context, config.labels)
    if config.reward is not None:
        yield RewardStage(context, config.reward)
    if config.policy is not None:
        yield PolicyStage(context, config.policy)
