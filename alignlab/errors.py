"""Named errors: what a user can cause. Each message gives the rule, the value seen and the fix."""

from __future__ import annotations

from typing import Any


class AlignlabError(Exception):
    """Base of every error that alignlab raises on purpose."""


class ConfigError(AlignlabError):
    """A configuration breaks a rule; raised before a model or a device is touched."""


class DataError(AlignlabError):
    """A dataset, a row or a chat template cannot be used."""


class RolloutError(AlignlabError):
    """A prompt cannot be generated from, or the engine cannot go on."""


class RewardError(AlignlabError):
    """A reward plug-in cannot be found, or failed more often than the config allows."""


class NothingLearntError(AlignlabError):
    """A run is over, and not one of its completions could be trained on: the saved weights are those of the start.

    Attributes:
        result: the `TrainResult`; the model, the metrics and the report are written.
        summary: the closing line of `alignlab train`, where a whole run was made from a config.
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result
        self.summary: dict[str, Any] = {}


class DiskError(AlignlabError, OSError):
    """A disk, a quota, a limit or a permission stops reading or writing. It is an `OSError` too, as callers expect."""


class CheckpointError(AlignlabError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class DeadlineError(AlignlabError):
    """What was waited for did not come in time; the message says for whom, and how long."""


class MemoryLimitError(AlignlabError):
    """The memory of the machine or of a device is used up."""


class NumericsError(AlignlabError):
    """A loss, a gradient, a weight or a score stopped being finite."""


class RankError(AlignlabError):
    """Another rank of the run has failed."""


class JudgeError(AlignlabError):
    """A judge cannot be reached, refuses, or has used up what it may cost."""
