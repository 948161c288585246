"""A run as `alignlab check` looks at it: its tokenizer, its data, and its models without weights, each made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignlab.config.data import DataSettings
    from alignlab.config.distill import TeacherSettings
    from alignlab.config.run import RunConfig
    from alignlab.config.trainers import OnlineConfig, TrainerConfig
    from alignlab.data.dataset import HasSequences
    from alignlab.scoring.loading import LoadedReward
    from alignlab.types import Prompt


class RowsOfSource(NamedTuple):
    """The rows of a source as the training reads them.

    Attributes:
        settings: settings of the source.
        prompts: prompts that the policy answers.
        examples: examples of a fixed dataset.
    """

    settings: DataSettings
    prompts: Sequence[Prompt] = ()
    examples: Sequence[HasSequences] = ()


@dataclass(frozen=True)
class CheckedRun:
    """A run's config and what is made of it."""

    config: RunConfig

    @cached_property
    def stages(self) -> tuple[TrainerConfig, ...]:
        """The trainings of the run, in order."""
        from alignlab.config.trainers import stages_of

        return stages_of(self.config.trainer)

    @property
    def online_stages(self) -> tuple[OnlineConfig, ...]:
        """The trainings that learn from rollouts, in order."""
        from alignlab.config.trainers import OnlineConfig

        return tuple(stage for stage in self.stages if isinstance(stage, OnlineConfig))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer."""
        from alignlab.starting_model import make_tokenizer

        return make_tokenizer(self.config)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The run's model without weights; of an adapter, its base."""
        from alignlab.starting_model import make_empty_model

        return make_empty_model(self.config.model, self.tokenizer)

    @property
    def teacher(self) -> TeacherSettings | None:
        """The teacher's settings, where a teacher judges each token of the student."""
        return getattr(self.config.trainer, "teacher", None)

    @property
    def aligns_text(self) -> bool:
        """True if the teacher has its own tokenizer, and judges spans of text."""
        return getattr(self.config.trainer, "alignment", "tokens") == "text"

    @cached_property
    def models(self) -> Mapping[str, PreTrainedModel]:
        """Models without weights that read the student's tokens, by their name in messages."""
        from alignlab.models.hub.checkpoints import empty_model

        if self.teacher is None or self.aligns_text:
            return {"the model": self.model}
        return {"the model": self.model, "the teacher": empty_model(self.teacher.name)}

    @cached_property
    def training_rows(self) -> RowsOfSource:
        """Rows to learn from.

        Raises:
            ConfigError, DataError: the training would refuse them.
        """
        return self._rows(self.config.data, with_prompts=self.config.trainer.measures == "accuracy")

    @cached_property
    def held_out_rows(self) -> RowsOfSource | None:
        """Rows to measure on; None without any.

        Raises:
            ConfigError, DataError: the training would refuse them.
        """
        settings = self.config.measured_data
        if settings is None:
            return None
        if self.config.trainer.measures == "accuracy":
            return RowsOfSource(settings, self._prompts(settings))
        return self._rows(settings, with_prompts=False)

    @cached_property
    def rewards(self) -> list[LoadedReward]:
        """The config's reward functions."""
        from alignlab.scoring.loading import load_reward

        return [load_reward(settings) for settings in self.config.rewards]

    @cached_property
    def scorer(self) -> LoadedReward | None:
        """The function that decides which answers are correct, if any."""
        from alignlab.scoring.loading import load_reward

        settings = self.config.evaluation.scorer_settings
        if settings is not None:
            return load_reward(settings)
        return self.rewards[0] if self.rewards else None

    def _rows(self, settings: DataSettings, *, with_prompts: bool) -> RowsOfSource:
        trainer = self.config.trainer
        read = _READERS.get(trainer.type)
        if read is None:
            return RowsOfSource(settings, self._prompts(settings))
        prompts = self._prompts(settings) if with_prompts else ()
        return RowsOfSource(settings, prompts, read(settings, self.tokenizer, trainer))

    def _prompts(self, settings: DataSettings) -> Sequence[Prompt]:
        from alignlab.data.prompts import load_prompts

        return load_prompts(settings, self.tokenizer)


def _completions(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, trainer: Any) -> Any:
    from alignlab.data.examples import load_examples

    return load_examples(settings, tokenizer)


def _pairs(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, trainer: Any) -> Any:
    from alignlab.data.preferences import load_preferences

    columns = {name: getattr(trainer, name, None) for name in ("margin_column", "probability_column")}
    return load_preferences(settings, tokenizer, **columns)


def _labelled(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, trainer: Any) -> Any:
    from alignlab.data.unpaired import load_unpaired

    return load_unpaired(settings, tokenizer)


# By `trainer.type`: readers of the examples of trainers that learn from a fixed dataset.
_READERS = {"sft": _completions, "distill": _completions, "dpo": _pairs, "reward": _pairs, "kto": _labelled}
