"""Outputs of other runs or commands that a config needs: if one is missing, the command that makes it.

Configs that belong together are in one folder. `trainer.output_dir` of each is the output of `alignlab train`; commands
in their comments show outputs with other settings, or of other commands:

    # The teacher first: alignlab train configs/teacher.yaml trainer.output_dir=runs/teacher
    #   trainer.num_steps=150

A command continues in the comment's next lines if these are indented.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alignlab.config.loader import read_settings
from alignlab.config.run import RunConfig
from alignlab.errors import ConfigError
from alignlab.files.home_folder import with_home
from alignlab.files.input_files import MAX_SETTINGS_BYTES, read_limited

_OUTPUT_OPTIONS = ("--output", "--write-examples")
_OUTPUT_SETTING = "trainer.output_dir="
_POSITIONAL = {"merge": 3, "student": 3}
"""Commands whose output is a positional argument, and its position among the words."""
_COMMAND = re.compile(r"\balignlab (?=train|sample|judge|merge|student)")
_OUTPUT_FOLDERS = ("output_dir",)


class Maker(NamedTuple):
    """A folder or file, and the command that makes it."""

    output: Path
    command: str

    @property
    def advice(self) -> str:
        """The command, which resumes a run that has begun."""
        is_begun = (self.output / "starts.jsonl").exists() and self.command.startswith("alignlab train")
        return f"{self.command} --resume, whose run has not come to its end" if is_begun else self.command


def check_prerequisites(config: RunConfig, source: str | Path) -> None:
    """Raise if a setting names the output of another config's run, or of a command in its comments, that is missing.

    A missing path that no command makes is left to the code that reads it.

    Args:
        source: the config's file; the other configs are in its folder.

    Raises:
        ConfigError: with the setting, its path and the command.
    """
    texts = _strings(config.model_dump(mode="json"))
    inputs = ((setting, value) for setting, value in texts if setting.rpartition(".")[2] not in _OUTPUT_FOLDERS)
    missing = [(setting, value) for setting, value in inputs if _may_be_missing(value)]
    makers = list(_makers(Path(source))) if missing else []
    for setting, value in missing:
        path = _absolute(value)
        maker = next((maker for maker in makers if maker.output == path or maker.output in path.parents), None)
        if maker is not None:
            raise ConfigError(f"{setting} is {value}, which does not exist yet; make it first: {maker.advice}")


def _may_be_missing(value: str) -> bool:
    """Return whether a text may be a path, and there is nothing at it."""
    return bool(value.strip()) and "\n" not in value and not _exists(_absolute(value))


def _strings(value: Any, setting: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in nested settings, with its dotted name."""
    if isinstance(value, str):
        yield setting, value
    elif isinstance(value, Mapping | list):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, entry in entries:
            yield from _strings(entry, f"{setting}.{key}" if setting else str(key))


def _makers(source: Path) -> Iterator[Maker]:
    """Yield the outputs of the commands in the comments of all configs of the folder, and of training each config."""
    files = sorted(file for file in source.absolute().parent.glob("*.yaml") if _is_file(file))
    for file in files:
        for command in _commands(file):
            yield from (Maker(_absolute(output), command) for output in _outputs(command))
    for file in files:
        output = _output_dir(file)
        if output is not None and file != source.absolute():
            yield Maker(_absolute(output), f"alignlab train {source.parent / file.name}")


def _output_dir(file: Path) -> str | None:
    try:
        trainer = read_settings(file).get("trainer")
    except (ConfigError, OSError):
        return None  # this YAML file is no config
    output = trainer.get("output_dir") if isinstance(trainer, dict) else None
    return output if isinstance(output, str) else None


def _commands(file: Path) -> Iterator[str]:
    """Yield the commands in a file's comments, each on one line."""
    try:
        lines = read_limited(file, MAX_SETTINGS_BYTES, ConfigError).splitlines()
    except ConfigError:
        return  # see `_output_dir`
    for number, line in enumerate(lines):
        match = _COMMAND.search(line) if line.startswith("#") else None
        if match is None:
            continue
        words = [line[match.start() :]]
        for following in lines[number + 1 :]:
            if not re.match(r"#\s{2,}\S", following) or _COMMAND.search(following):
                break
            words.append(following[1:])
        yield " ".join(word.strip().removesuffix("\\").strip() for word in words)


def _outputs(command: str) -> Iterator[str]:
    """Yield the outputs of a command."""
    try:
        words = shlex.split(command)
    except ValueError:
        return  # prose, and no command
    place = _POSITIONAL.get(words[1])
    if place is not None and len(words) > place:
        yield words[place]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in _OUTPUT_OPTIONS and following:
            yield following
        elif word.startswith(_OUTPUT_SETTING) and words[1] == "train":
            yield word.removeprefix(_OUTPUT_SETTING)


def _absolute(path: str) -> Path:
    return with_home(path).absolute()


def _is_file(path: Path) -> bool:
    """Return whether a path is a file; editors leave links to nothing beside an open file."""
    try:
        return path.is_file()
    except OSError:
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte: no path
        return False
