"""The identity of a run: its settings, and digests of its data, rewards and model.

Each checkpoint holds the identity, and a resumed run compares it with its own. The classes of the settings say which
of them a resumed run may change, see `config.base.OnResume`; `config/README.md` has the table.
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

from alignlab.config.base import Frozen, OnResume
from alignlab.config.error_messages import show
from alignlab.config.judge import Constitution
from alignlab.config.moved_settings import with_current_names
from alignlab.config.resume import Setting, flat_settings
from alignlab.config.run import EvaluationSettings, RunConfig
from alignlab.data.dataset import HasSequences, digest_of
from alignlab.errors import CheckpointError
from alignlab.files.atomic_files import write_atomically
from alignlab.files.digests import DamagedError, as_json, digest_of_values, json_digest, parse_sealed, sealed
from alignlab.loop.given_data import GivenData
from alignlab.loop.run_description import RunDescription
from alignlab.models.fingerprints import model_settings, weights_fingerprint
from alignlab.models.weight_view import whole_parameters
from alignlab.scoring.loading import LoadedReward
from alignlab.scoring.source_digest import source_digest
from alignlab.types import Prompt

logger = logging.getLogger(__name__)
OWN = "trainer"
"""Name of the trainer's section in the saved settings, whatever the user calls that section."""
TRAIN_ROWS, EVAL_ROWS, START = "train_rows", "eval_rows", "start"
NO_ROWS = "none"
_CONTENTS = {
    TRAIN_ROWS: "the training data has changed: its tokens, its order, or columns such as answers",
    START: "the starting weights are others, and are not used: training goes on from the checkpoint's weights",
    EVAL_ROWS: "the held-out data, on which the run was measured at its start, has changed",
}
_ADAPTER, _MODEL = "peft_config", "model_config"
_OF_ADAPTERS = (
    "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "target_modules", "target_parameters",
    "modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern",
)  # fmt: skip


class Change(NamedTuple):
    """A setting or a content that differs from the checkpoint's."""

    name: str
    text: str
    rule: OnResume


class RunIdentity:
    """The settings and contents of a run.

    Args:
        config: the trainer's section.
        model: in training; its architecture and its adapter's settings are part of the identity.

    Attributes:
        changes: changes that earlier resumptions of the run have made: {"step": ..., "changes": [...]} each.
    """

    def __init__(self, config: Frozen, model: nn.Module | None = None) -> None:
        self._settings = flat_settings(config, OWN) | _adapter_settings(model) | _model_settings(model)
        self._contents: dict[str, Setting] = {}
        self._descriptions = dict(_CONTENTS)
        self._section = "config"
        self.changes: list[dict[str, Any]] = []
        self._settings_are_final = False
        if model is not None and not isinstance(model, PeftModel):
            self.add_content(START, weights_fingerprint(whole_parameters(model)), rule=OnResume.RECORDED)

    def add_run(self, config: RunConfig) -> None:
        """Add the settings of the file that describes the run."""
        self._settings |= flat_settings(config)

    def describe(self, run: RunDescription) -> None:
        """Take the user's name of the trainer's section, and whether recorded settings may still change."""
        self._section, self._settings_are_final = run.section, run.settings_are_final

    def add_section(self, name: str, section: Frozen) -> None:
        """Add settings that the trainer takes beside its own section."""
        self._settings |= flat_settings(section, name)

    def add_content(
        self, name: str, digest: str, *, rule: OnResume = OnResume.REFUSED, change: str | None = None
    ) -> None:
        """Add a content, which is compared by its digest.

        Args:
            change: the sentence that reports another digest; default: "NAME has changed".
        """
        self._contents[name] = Setting(digest, rule)
        if change is not None:
            self._descriptions[name] = change

    def _name_data(self, train: GivenData, held_out: GivenData | None) -> None:
        """Put the sources of the data into the messages."""
        for name, data in ((TRAIN_ROWS, train), (EVAL_ROWS, held_out)):
            if data is not None:
                self._descriptions[name] = f"{data.settings.source}: {_CONTENTS[name]}"

    def add_prompts(self, tokens: str, prompts: Sequence[Prompt]) -> None:
        """Add the training prompts, with the columns that reward functions read.

        Args:
            tokens: digest of their token ids.
        """
        self.add_content(TRAIN_ROWS, prompts_digest(prompts, tokens))

    def add_held_out(
        self, prompts: Sequence[Prompt], evaluation: EvaluationSettings, train: GivenData, held_out: GivenData | None
    ) -> None:
        """Add the prompts on which accuracy is measured, and the settings of the measurement.

        Args:
            train, held_out: the data with their sources, for messages.
        """
        self._name_data(train, held_out)
        tokens = digest_of(prompts)
        self.add_content(EVAL_ROWS, prompts_digest(prompts, tokens))
        self.add_section("evaluation", evaluation)

    def add_examples(
        self, digest: str, held_out_examples: Sequence[HasSequences], train: GivenData, held_out: GivenData | None
    ) -> None:
        """Add the training examples, by their digest, and the held-out examples.

        Args:
            train, held_out: the data with their sources, for messages.
        """
        self._name_data(train, held_out)
        self.add_content(TRAIN_ROWS, digest)
        self.add_content(EVAL_ROWS, digest_of(held_out_examples) if held_out_examples else NO_ROWS)

    def add_constitution(self, constitution: Constitution) -> None:
        """Add the constitution of a judge."""
        digest = digest_of_values([constitution.model_dump(mode="json")])
        self.add_content("constitution", digest, change="the constitution has changed")

    def add_rewards(self, rewards: Sequence[LoadedReward]) -> None:
        """Add the reward functions: their settings and their source code."""
        self._settings["rewards"] = Setting(len(rewards), OnResume.REFUSED)
        for number, reward in enumerate(rewards):
            self.add_section(f"rewards.{number}", reward.settings)
            source = source_digest(reward.function)
            if source is not None:
                change = f"the source of the reward {reward.name}, or a value that is bound to it, has changed"
                self.add_content(f"reward_source.{number}", source, rule=OnResume.RECORDED, change=change)

    @property
    def summary(self) -> dict[str, Any]:
        """Changes on resumption, for the closing report."""
        return {"changed_on_resume": self.changes} if self.changes else {}

    def to_json(self) -> dict[str, Any]:
        """Return the identity as a checkpoint holds it."""
        return {
            "settings": {name: setting.value for name, setting in self._settings.items()},
            "contents": {name: setting.value for name, setting in self._contents.items()},
            "changes": self.changes,
        }

    def check(self, saved: Mapping[str, Any] | None, *, path: Path, step: int | None, log: bool = True) -> None:
        """Compare the saved identity of a run with that of its resumption; log and record the allowed changes.

        Args:
            saved: output of `to_json`; None from an earlier version, which is logged and not compared.
            path: of the checkpoint or the file that holds `saved`, for messages.
            step: the step after which the run goes on; None where it is not known yet.
            log: whether this rank writes to the log.

        Raises:
            CheckpointError: with each change that is refused.
        """
        if saved is None:
            if log:
                logger.warning("%s is of an earlier version, which kept no settings: they are not compared", path)
            return
        changes = self._compare(saved)
        _check_none_is_refused(changes, path)
        self.changes = [dict(change) for change in saved["changes"]]
        recorded = [change.text for change in changes if change.rule is OnResume.RECORDED]
        if not recorded:
            return
        self.changes.append({"step": step, "changes": recorded})
        if log:
            since = "from here" if step is None else f"from step {step + 1}"
            logger.warning("%s on the run has other settings: %s", since, "; ".join(recorded))

    def record(self, step: int, change: str, *, log: bool = True) -> None:
        """Record, and log, an allowed change that is no setting's.

        Args:
            step: the step after which the run goes on.
            change: a sentence.
            log: whether this rank writes to the log.
        """
        self.changes.append({"step": step, "changes": [change]})
        if log:
            logger.warning("from step %d on: %s", step + 1, change)

    def keep_file(self, path: Path, *, resume: bool, accelerator: Accelerator) -> None:
        """Compare with the file of an earlier start, and write one for the next; every rank calls this together.

        Args:
            resume: whether the run goes on.

        Raises:
            CheckpointError: as `check`; or the file is damaged.
        """
        if resume:
            self.check(_read(path), path=path, step=None, log=accelerator.is_main_process)
        accelerator.wait_for_everyone()  # all ranks read the old file before rank 0 replaces it
        if accelerator.is_main_process:
            write_atomically(path, json.dumps(sealed(self.to_json()), indent=1) + "\n")

    def _compare(self, saved: Mapping[str, Any]) -> list[Change]:
        """Return all changes. A name that only one side has, as of another version, is no change."""
        before = with_current_names(saved["settings"], self._settings)
        by_file = "model.name" in before and "model.name" in self._settings
        changes = [
            Change(
                name, f"{self._displayed(name)} was {show(before[name])} and is {show(setting.value)}",
                self._rule_of(setting),
            )
            for name, setting in self._settings.items()
            if name in before
            and json_digest(before[name]) != json_digest(setting.value)
            and not (by_file and name.startswith(f"{_ADAPTER}."))  # the same change is reported by the name in the file
        ]
        return changes + [
            Change(name, self._descriptions.get(name, f"{name} has changed"), content.rule)
            for name, content in self._contents.items()
            if saved["contents"].get(name, content.value) != content.value
        ]

    def _rule_of(self, setting: Setting) -> OnResume:
        is_refused = self._settings_are_final and setting.rule is OnResume.RECORDED
        return OnResume.REFUSED if is_refused else setting.rule

    def _displayed(self, name: str) -> str:
        return f"{self._section}{name.removeprefix(OWN)}" if name.startswith(f"{OWN}.") else name


def _check_none_is_refused(changes: Sequence[Change], path: Path) -> None:
    refused = [change.text for change in changes if change.rule is OnResume.REFUSED]
    if refused:
        raise CheckpointError(
            f"{path} is of a run with other settings, and to go on with these would make it another run:\n"
            + "".join(f"  - {text}\n" for text in refused)
            + "Resume with the settings and data that the run was started with, or begin a new run in another "
            "output_dir, from the model that this one has trained if you like"
        )


def _read(path: Path) -> dict[str, Any] | None:
    """Return the identity that a file holds; None without the file."""
    if not path.exists():
        return None
    try:
        return parse_sealed(path.read_bytes())
    except DamagedError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), and holds the settings that the run was started with; remove it to go on "
            "without a comparison, if nothing has changed since"
        ) from error


def _model_settings(model: nn.Module | None) -> dict[str, Setting]:
    """Return the settings of the model's architecture."""
    values = {} if model is None else model_settings(model)
    return {f"{_MODEL}.{name}": Setting(value, OnResume.REFUSED) for name, value in values.items()}


def _adapter_settings(model: nn.Module | None) -> dict[str, Setting]:
    """Return the settings of the adapter in training; none without an adapter."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.peft_config[model.active_adapter]
    values = {name: as_json(getattr(config, name, None)) for name in _OF_ADAPTERS}
    return {f"{_ADAPTER}.{name}": Setting(value, OnResume.REFUSED) for name, value in values.items()}


def prompts_digest(prompts: Sequence[Prompt], tokens: str) -> str:
    """Return the digest of prompts with their columns, which reward functions read.

    Args:
        tokens: digest of their token ids.
    """
    if not prompts:
        return NO_ROWS
    return digest_of_values([tokens, *((prompt.text, prompt.columns) for prompt in prompts)])
