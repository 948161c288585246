"""What makes a run this run: its settings, and the content of its data, rewards and adapter.

Kept in each checkpoint, and compared when the run goes on. What a resumed run may change of its settings is said by the
settings' own classes, see `config.on_resume`; `config/README.md` has the table.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from alignlab.atomic_files import write_atomically
from alignlab.config.base import Frozen
from alignlab.config.constitution import Constitution
from alignlab.config.flat_settings import Setting, flat_settings
from alignlab.config.messages import show
from alignlab.config.on_resume import OnResume
from alignlab.config.run import EvaluationSettings, RunConfig
from alignlab.data.sequences import HasSequences, digest_of
from alignlab.digests import DamagedError, as_json, digest_of_values, json_digest, parse_sealed, sealed
from alignlab.errors import CheckpointError
from alignlab.models.computed import model_settings
from alignlab.trainers.given_data import GivenData
from alignlab.training.checkpoint import fingerprint
from alignlab.training.reward_functions import LoadedReward
from alignlab.training.reward_source import source_digest
from alignlab.types import Prompt

logger = logging.getLogger(__name__)
OWN = "trainer"
"""Under this name a trainer's own section is kept, whatever its user calls it."""
TRAIN_ROWS, EVAL_ROWS, START = "train_rows", "eval_rows", "start"
NO_ROWS = "none"
_CONTENTS = {
    TRAIN_ROWS: "the training data has changed: its tokens, its order, or columns such as answers",
    START: "the starting weights are others, in whose place the checkpoint's are trained on",
    EVAL_ROWS: "the held-out data, on which the run was measured at its begin, has changed",
}
_ADAPTER, _MODEL = "peft_config", "model_config"
_OF_ADAPTERS = (
    "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "target_modules", "target_parameters",
    "modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern",
)  # fmt: skip


class Change(NamedTuple):
    """A setting or a content that is another than when the checkpoint was written."""

    name: str
    text: str
    rule: OnResume


class RunIdentity:
    """The settings and contents of a run.

    Args:
        config: the trainer's section.
        model: in training; what its adapter is, is part of the run.

    Attributes:
        prefix: how the user calls that section, for messages.
        changes: what earlier resumptions of the run have changed: {"step": ..., "changes": [...]} each.
    """

    def __init__(self, config: Frozen, model: nn.Module | None = None) -> None:
        self._settings = flat_settings(config, OWN) | _adapter_settings(model) | _model_settings(model)
        self._contents: dict[str, Setting] = {}
        self._descriptions = dict(_CONTENTS)
        self.prefix = "config"
        self.changes: list[dict[str, Any]] = []
        if model is not None and not isinstance(model, PeftModel):
            self.add_content(START, fingerprint(model.named_parameters()), rule=OnResume.RECORDED)

    def add_run(self, config: RunConfig) -> None:
        """Add the settings of the file that describes the run."""
        self._settings |= flat_settings(config)
        self.prefix = OWN

    def add_section(self, name: str, section: Frozen) -> None:
        """Add settings that the trainer was given beside its own section."""
        self._settings |= flat_settings(section, name)

    def add_content(
        self, name: str, digest: str, *, rule: OnResume = OnResume.REFUSED, what: str | None = None
    ) -> None:
        """Add what is compared by its digest.

        Args:
            what: the sentence that says so where it is another.
        """
        self._contents[name] = Setting(digest, rule)
        if what is not None:
            self._descriptions[name] = what

    def _name_data(self, train: GivenData, held_out: GivenData | None) -> None:
        """Keep where the data comes from, for messages."""
        for name, data in ((TRAIN_ROWS, train), (EVAL_ROWS, held_out)):
            if data is not None:
                self._descriptions[name] = f"{data.settings.source}: {_CONTENTS[name]}"

    def add_prompts(self, tokens: str, prompts: Sequence[Prompt]) -> None:
        """Add prompts to learn from, with the columns that rewards are made of.

        Args:
            tokens: digest of their token ids.
        """
        self.add_content(TRAIN_ROWS, prompts_digest(prompts, tokens))

    def add_held_out(
        self, prompts: Sequence[Prompt], evaluation: EvaluationSettings, train: GivenData, held_out: GivenData | None
    ) -> None:
        """Add the prompts on which accuracy is measured, and how.

        Args:
            train, held_out: where the data comes from, for messages.
        """
        self._name_data(train, held_out)
        tokens = digest_of(((prompt.token_ids,), ()) for prompt in prompts)
        self.add_content(EVAL_ROWS, prompts_digest(prompts, tokens))
        self.add_section("evaluation", evaluation)

    def add_examples(
        self, digest: str, measured: Sequence[HasSequences], train: GivenData, held_out: GivenData | None
    ) -> None:
        """Add examples to learn from, by their digest, and those to measure on.

        Args:
            train, held_out: where they come from, for messages.
        """
        self._name_data(train, held_out)
        self.add_content(TRAIN_ROWS, digest)
        of_measured = digest_of((example.sequences, example.labels) for example in measured)
        self.add_content(EVAL_ROWS, of_measured if measured else NO_ROWS)

    def add_constitution(self, constitution: Constitution) -> None:
        """Add what a judge goes by."""
        digest = digest_of_values([constitution.model_dump(mode="json")])
        self.add_content("constitution", digest, what="the constitution has changed")

    def add_rewards(self, rewards: Sequence[LoadedReward]) -> None:
        """Add the reward functions: as they were asked for, and their source."""
        self._settings["rewards"] = Setting(len(rewards), OnResume.REFUSED)
        for number, reward in enumerate(rewards):
            self.add_section(f"rewards.{number}", reward.settings)
            source = source_digest(reward.function)
            if source is not None:
                what = f"the source of the reward {reward.name}, or a value that is bound to it, has changed"
                self.add_content(f"reward_source.{number}", source, rule=OnResume.RECORDED, what=what)

    @property
    def summary(self) -> dict[str, Any]:
        """What the closing report says of changes on the way."""
        return {"changed_on_resume": self.changes} if self.changes else {}

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "settings": {name: setting.value for name, setting in self._settings.items()},
            "contents": {name: setting.value for name, setting in self._contents.items()},
            "changes": self.changes,
        }

    def check(self, saved: Mapping[str, Any] | None, *, path: Path, step: int | None, say: bool = True) -> None:
        """Compare the run with one that goes on here; changes that are recorded are said in the log and kept.

        Args:
            saved: what `to_json` gave for it; None of an earlier version, which is said.
            path: of the checkpoint or the file that holds it, for messages.
            step: that it goes on after, where that is known.
            say: whether this rank writes to the log.

        Raises:
            CheckpointError: with each change that is refused.
        """
        if saved is None:
            if say:
                logger.warning("%s is of an earlier version, which kept no settings: they are not compared", path)
            return
        changes = self._compare(saved)
        refused = [change.text for change in changes if change.rule is OnResume.REFUSED]
        if refused:
            raise CheckpointError(
                f"{path} is of a run with other settings, and to go on with these would make it another run:\n"
                + "".join(f"  - {text}\n" for text in refused)
                + "Resume with what the run was started with, or begin a new run in another output_dir, from what this "
                "one has learnt if you like"
            )
        self.changes = [dict(change) for change in saved["changes"]]
        recorded = [change.text for change in changes if change.rule is OnResume.RECORDED]
        if recorded:
            self.changes.append({"step": step, "changes": recorded})
            since = "from here" if step is None else f"from step {step + 1}"
            if say:
                logger.warning("%s on the run has other settings: %s", since, "; ".join(recorded))

    def keep_file(self, path: Path, *, resume: bool, accelerator: Accelerator) -> None:
        """Compare with the file that an earlier start has kept, and keep one; every rank calls this together.

        Args:
            resume: whether the run goes on.

        Raises:
            CheckpointError: as `check`; or the file is damaged.
        """
        if resume:
            self.check(_read(path), path=path, step=None, say=accelerator.is_main_process)
        accelerator.wait_for_everyone()  # nobody writes before all have read
        if accelerator.is_main_process:
            write_atomically(path, json.dumps(sealed(self.to_json()), indent=1) + "\n")

    def _compare(self, saved: Mapping[str, Any]) -> list[Change]:
        """All changes; what only one of the two knows, as of another version, is none."""
        before, now = saved["settings"], self._settings
        by_file = "model.name" in before and "model.name" in now
        changes = [
            Change(name, f"{self._called(name)} was {show(before[name])} and is {show(setting.value)}", setting.rule)
            for name, setting in now.items()
            if name in before
            and json_digest(before[name]) != json_digest(setting.value)
            and not (by_file and name.startswith(f"{_ADAPTER}."))  # the file says it in its own words
        ]
        return changes + [
            Change(name, self._descriptions.get(name, f"{name} has changed"), content.rule)
            for name, content in self._contents.items()
            if saved["contents"].get(name, content.value) != content.value
        ]

    def _called(self, name: str) -> str:
        return f"{self.prefix}{name.removeprefix(OWN)}" if name.startswith(f"{OWN}.") else name


def _read(path: Path) -> dict[str, Any] | None:
    """What a file keeps; None where there is none."""
    if not path.exists():
        return None
    try:
        return parse_sealed(path.read_bytes())
    except DamagedError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), and says what the run was started with; remove it to go on without a "
            "comparison, if nothing has changed since"
        ) from error


def _model_settings(model: nn.Module | None) -> dict[str, Setting]:
    """What the model computes, whatever its weights are."""
    values = {} if model is None else model_settings(model)
    return {f"{_MODEL}.{name}": Setting(value, OnResume.REFUSED) for name, value in values.items()}


def _adapter_settings(model: nn.Module | None) -> dict[str, Setting]:
    """What the adapter in training is; nothing where there is none."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.peft_config[model.active_adapter]
    values = {name: as_json(getattr(config, name, None)) for name in _OF_ADAPTERS}
    return {f"{_ADAPTER}.{name}": Setting(value, OnResume.REFUSED) for name, value in values.items()}


def prompts_digest(prompts: Sequence[Prompt], tokens: str) -> str:
    """Digest of prompts with their columns, of which rewards are made.

    Args:
        tokens: digest of their token ids.
    """
    if not prompts:
        return NO_ROWS
    return digest_of_values([tokens, *((prompt.text, prompt.columns) for prompt in prompts)])
