"""The models of `alignlab eval`: from the words MODEL on the command line to folders of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from alignlab.cli.policy import is_adapter
from alignlab.errors import CheckpointError, ConfigError
from alignlab.files.home_folder import with_home


class Candidate(NamedTuple):
    """A policy to evaluate.

    Attributes:
        name: its label, or MODEL as it was typed.
        model: a Hub id, a packaged model or a folder; an adapter's folder means its base with the adapter on it.
        adapter: folder of an adapter to put on the model.
        labelled: True if the name is a label.
        is_as_given: True if `model` is the word on the command line, False if it was derived from a run's folder.
    """

    name: str
    model: str
    adapter: str | None = None
    labelled: bool = False
    is_as_given: bool = True

    @property
    def adapted(self) -> bool:
        """True if the policy has an adapter."""
        return self.adapter is not None or is_adapter(self.model)


def candidates_of(words: Sequence[str], adapter: str | None, default: str | None) -> list[Candidate]:
    """Return the policies that MODEL ..., --adapter and the config describe.

    Args:
        words: each a Hub id, a packaged model, the folder of a model, an adapter or a run; or LABEL=one of these.
        adapter: --adapter, for one model.
        default: the config's model, used if neither is given.

    Raises:
        ConfigError: there is no policy; or a word is a setting, has no label before "=" or is given twice.
        CheckpointError: a folder is that of a run that has written no weights.
    """
    if len(words) > 1 and adapter is not None:
        raise ConfigError(
            f"--adapter is {adapter}, and goes with one MODEL, and {len(words)} are given; give an adapter's "
            "folder as a MODEL of its own"
        )
    place = adapter or default
    if not words and place is None:
        raise ConfigError("no model to evaluate: give MODEL or --adapter; a config with an architecture has no weights")
    candidates = [_candidate(word, adapter) for word in words or [str(place)]]
    _check_names([candidate.name for candidate in candidates])
    return candidates


def _check_names(names: Sequence[str]) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        fix = f"leave one out, or give each a different label: a={repeated}"
        raise ConfigError(f"MODEL {repeated} is given twice; {fix}")


def _candidate(word: str, adapter: str | None) -> Candidate:
    label, place = split_label(word)
    place = str(with_home(place)) if place.startswith("~") else place
    model, extra_adapter = weights_of(place), None if adapter == place else adapter
    return Candidate(label or word, model, extra_adapter, labelled=label is not None, is_as_given=model == place)


def split_label(word: str) -> tuple[str | None, str]:
    """Return (label, place) of LABEL=PLACE, or (None, word) without a label. A path may contain "=".

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
    """Return the adapter or the model of a run if `place` is a run's folder, else `place`.

    Raises:
        CheckpointError: the run has written neither yet.
    """
    from alignlab.runs.folder import holds_run, output_of_run

    folder = Path(place)
    if is_adapter(place) or (folder / "config.json").is_file():
        return place
    output = output_of_run(folder)
    if output is None and holds_run(folder):
        raise CheckpointError(
            f"{place} holds a run that has written no adapter and no model yet; finish it by alignlab train --resume"
        )
    return place if output is None else str(output)

