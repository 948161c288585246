"""Which models `alignlab eval` is to look at: what a MODEL on the command line means, and whether it can be had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from alignlab.cli.policy import is_adapter
from alignlab.errors import CheckpointError, ConfigError


class Candidate(NamedTuple):
    """A policy to evaluate.

    Attributes:
        name: its label, or MODEL as it was typed.
        model: a Hub id, a packaged model or a folder; that of an adapter stands for its base with it on top.
        adapter: folder of an adapter to put on the model.
        labelled: whether the name is a label.
        is_as_given: whether `model` is the place that was given, and not what was found in a run's folder.
    """

    name: str
    model: str
    adapter: str | None = None
    labelled: bool = False
    is_as_given: bool = True

    @property
    def adapted(self) -> bool:
        """Whether an adapter is part of it."""
        return self.adapter is not None or is_adapter(self.model)


def candidates_of(words: Sequence[str], adapter: str | None, default: str | None) -> list[Candidate]:
    """The policies that MODEL ..., --adapter and the config describe.

    Args:
        words: each a Hub id, a packaged model, the folder of a model, an adapter or a run; or LABEL=one of these.
        adapter: --adapter, for one model.
        default: the config's model, for where neither is given.

    Raises:
        ConfigError: there is none, or a word is a setting, has no label before "=" or is given twice.
        CheckpointError: the folder is that of a run that has made nothing.
    """
    if len(words) > 1 and adapter is not None:
        raise ConfigError(
            f"--adapter is {adapter}, and goes with one MODEL, and {len(words)} are given; give an adapter's "
            "folder as a MODEL of its own"
        )
    one = adapter or default
    if not words and one is None:
        raise ConfigError("no model to evaluate: give MODEL or --adapter; a config with an architecture has no weights")
    candidates = [_candidate(word, adapter) for word in words or [str(one)]]
    _check_names([candidate.name for candidate in candidates])
    return candidates


def _check_names(names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"MODEL {twice} is given twice; leave one out, or give each a label of its own: a={twice}")


def _candidate(word: str, adapter: str | None) -> Candidate:
    label, place = split_label(word)
    model, own = weights_of(place), None if adapter == place else adapter
    return Candidate(label or word, model, own, labelled=label is not None, is_as_given=model == place)


def split_label(word: str) -> tuple[str | None, str]:
    """(label, place) of LABEL=PLACE; (None, word) where there is no label. A path may have "=" in it.

    Raises:
        ConfigError: the word is a setting of a config, or one of the two is empty.
    """
    from alignlab.config.run import RunConfig

    label, equals, place = word.partition("=")
    if not equals or "/" in label or Path(word).exists():
        return None, word
    if label.partition(".")[0] in RunConfig.model_fields:
        raise ConfigError(f"MODEL is {word!r}, which is a setting; write --set {word}, or choose another label")
    if not label or not place:
        raise ConfigError(f"MODEL is {word!r}, and must be a model, or LABEL=MODEL with both; write them out")
    return label, place


def weights_of(place: str) -> str:
    """The adapter or the model of a run, where `place` is a run's folder; any other place as it is.

    Raises:
        CheckpointError: the run has made neither yet.
    """
    from alignlab.training.run_folder import holds_run, made_in

    folder = Path(place)
    if is_adapter(place) or (folder / "config.json").is_file():
        return place
    made = made_in(folder)
    if made is None and holds_run(folder):
        raise CheckpointError(
            f"{place} holds a run that has made no adapter and no model yet; finish it by alignlab train --resume"
        )
    return place if made is None else str(made)

