"""Which command makes what a config names and is not there: the result of another run, or of another command.

Configs that belong together are in one folder. Their runs' folders (`trainer.output_dir`) say what `alignlab train`
makes of each; the commands in their comments say it too, with other settings or of other commands:

    # The teacher first: alignlab train configs/teacher.yaml trainer.output_dir=runs/teacher
    #   trainer.num_steps=150

A command goes on in the comment's next lines where these are indented.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alignlab.config.input_limits import MAX_SETTINGS_BYTES, read_limited
from alignlab.config.loader import read_settings
from alignlab.config.run import RunConfig
from alignlab.errors import ConfigError

_OUTPUT_OPTIONS = ("--output", "--write-examples")
_OUTPUT_SETTING = "trainer.output_dir="
_POSITIONAL = {"merge": 3, "student": 3}
"""Commands that name their output by place, and its place among their words."""
_COMMAND = re.compile(r"\balignlab (?=train|sample|judge|merge|student)")
_OWN_FOLDERS = ("output_dir",)


class Maker(NamedTuple):
    """A folder or file and the command that makes it."""

    output: Path
    command: str


def check_results(config: RunConfig, source: str | Path) -> None:
    """Raise if a setting names what another config's run, or a command in its comments, has still to make.

    A path that is missing and that nothing here makes is left to whatever reads it.

    Args:
        source: the config's file, in whose folder the others are.

    Raises:
        ConfigError: with the setting, its path and the command.
    """
    source = Path(source)
    makers: list[Maker] | None = None
    for setting, value in _strings(config.model_dump(mode="json")):
        path = _absolute(value)
        if "\n" in value or not value.strip() or _exists(path) or setting.rpartition(".")[2] in _OWN_FOLDERS:
            continue
        makers = list(_makers(source)) if makers is None else makers
        maker = next((each for each in makers if each.output == path or each.output in path.parents), None)
        if maker is not None:
            begun = (maker.output / "starts.jsonl").exists() and maker.command.startswith("alignlab train")
            fix = f"{maker.command} --resume, whose run has not come to its end" if begun else maker.command
            raise ConfigError(f"{setting} is {value}, which does not exist yet; make it first: {fix}")


def _strings(value: Any, setting: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested settings, with its dotted name."""
    if isinstance(value, str):
        yield setting, value
    elif isinstance(value, Mapping | list):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, entry in entries:
            yield from _strings(entry, f"{setting}.{key}" if setting else str(key))


def _makers(source: Path) -> Iterator[Maker]:
    """What is made by the commands in the comments of all configs of the folder, and by training each."""
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
        return None  # a file that is no config is not this run's concern
    output = trainer.get("output_dir") if isinstance(trainer, dict) else None
    return output if isinstance(output, str) else None


def _commands(file: Path) -> Iterator[str]:
    """The commands in a file's comments, each on one line."""
    try:
        lines = read_limited(file, MAX_SETTINGS_BYTES, ConfigError).splitlines()
    except ConfigError:
        return  # see `_output_dir`
    for number, line in enumerate(lines):
        found = _COMMAND.search(line) if line.startswith("#") else None
        if found is None:
            continue
        words = [line[found.start() :]]
        for following in lines[number + 1 :]:
            if not re.match(r"#\s{2,}\S", following) or _COMMAND.search(following):
                break
            words.append(following[1:])
        yield " ".join(word.strip().removesuffix("\\").strip() for word in words)


def _outputs(command: str) -> Iterator[str]:
    """What a command writes."""
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
    return Path(path).expanduser().absolute()


def _is_file(path: Path) -> bool:
    """Whether it is a file, and no folder, pipe or link to nothing, as editors leave beside a file that is open."""
    try:
        return path.is_file()
    except OSError:
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte: no path
        return False
