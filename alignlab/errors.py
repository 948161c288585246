"""Named errors: what a user can cause. Each message gives the rule, the value seen and the fix."""


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


class CheckpointError(AlignlabError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class NumericsError(AlignlabError):
    """A loss or a gradient stopped being finite."""


class JudgeError(AlignlabError):
    """A judge cannot be reached, refuses, or has used up what it may cost."""
