"""Repair of a model's generation defaults (`generation_config.json`), so that they can be saved with the model.

`transformers` reads a file that contradicts itself with a warning, and refuses to write it. Llama 2 chat and Vicuna
were published with such a file: it sets a temperature and not `do_sample`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from alignlab.errors import CheckpointError
from alignlab.files.input_files import read_json_object

logger = logging.getLogger(__name__)
_SAMPLING = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
"""Fields that are read only while sampling, with their neutral values."""
_BEAM = {"early_stopping": False, "length_penalty": 1.0}
"""Fields that are read only by beam search, with their neutral values."""
_CACHE = ("cache_implementation", "cache_config")
_NUMBERS = (*_SAMPLING, "length_penalty", "repetition_penalty", "max_new_tokens", "min_new_tokens", "num_beams")
_SWITCHES = ("do_sample", "use_cache")
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")


def check_generation_file(path: str) -> None:
    """Raise if a checkpoint's `generation_config.json` cannot be used.

    `transformers` treats a file that is no JSON as absent.

    Args:
        path: a folder, or the id of a Hub model.

    Raises:
        CheckpointError: it is no JSON object, or a field is of another type than it must be; with the file.
    """
    try:
        file = cached_file(path, GENERATION_CONFIG_NAME)
    except OSError:  # no such file, or an unreachable model, which fails at loading
        return
    values = read_json_object(Path(str(file)), CheckpointError)
    _refuse_other_types(values, str(file), "correct the file")


def writable_generation_config(config: GenerationConfig, whose: str) -> GenerationConfig:
    """Return generation defaults of the same meaning that `transformers` can write; `config` itself if it can.

    Sampling fields without `do_sample` turn sampling on, as the publisher meant and as vLLM reads them; with
    `do_sample: false`, or a temperature of 0, decoding is greedy and they are removed. A field without effect, such as
    a length penalty without beams, is removed too. Each change is logged.

    Args:
        whose: the model, for messages.

    Raises:
        CheckpointError: the defaults contradict themselves in another way.
    """
    repaired = copy.deepcopy(config)
    _refuse_other_types(
        vars(repaired), f"the generation defaults of {whose}", "correct its generation_config.json"
    )
    changes = [*_repair_sampling(repaired), *_remove_unread(repaired)]
    try:
        repaired.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"the generation defaults of {whose} cannot be written with the trained model: {error}\nCorrect its "
            "generation_config.json, or model.generation_config of a live model"
        ) from error
    if not changes:
        return config
    logger.warning(
        "the generation defaults of %s contradict themselves, and are saved with these changes: %s",
        whose, "; ".join(changes),
    )
    return repaired


def _refuse_other_types(values: Mapping[str, Any], whose: str, fix: str) -> None:
    rules = [(_NUMBERS, _is_number, "a number"), (_SWITCHES, _is_switch, "true or false")]
    rules += [(_TOKENS[:1], _is_token_or_list, "a token id or a list of them"), (_TOKENS[1:], _is_token, "a token id")]
    for names, is_right, must in rules:
        for name in names:
            value = values.get(name)
            if value is not None and not is_right(value):
                raise CheckpointError(f"{whose} has {name} {value!r:.60}, which must be {must}; {fix}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_or_list(value: Any) -> bool:
    return all(map(_is_token, value)) if isinstance(value, list | tuple) else _is_token(value)


def _repair_sampling(config: GenerationConfig) -> list[str]:
    """Make the sampling fields and `do_sample` agree; return the changes."""
    fields = _set(config, _SAMPLING)
    if config.do_sample is True or not fields:
        return []
    named = ", ".join(f"{name} {value}" for name, value in fields.items())
    if config.do_sample is None and config.temperature != 0:
        config.do_sample = True
        return [f"do_sample is set to true, which {named} need"]
    _unset(config, fields)
    why = "a temperature of 0 is greedy" if config.do_sample is None else "do_sample is false"
    return [f"{named} are removed: {why}"]


def _remove_unread(config: GenerationConfig) -> list[str]:
    """Remove fields that have no effect and cannot be written; return the changes."""
    cache = [name for name in _CACHE if getattr(config, name, None) is not None]
    outputs = [name for name in config.extra_output_flags if getattr(config, name, None) is True]
    groups = (
        (list(_set(config, _BEAM)), config.num_beams in (None, 1), "there are no beams"),
        (cache, config.use_cache is False, "use_cache is false"),
        (outputs, config.return_dict_in_generate is not True, "return_dict_in_generate is not true"),
    )
    changes = []
    for names, is_unread, why in groups:
        if names and is_unread:
            _unset(config, names)
            changes.append(f"{', '.join(names)} removed: {why}")
    if isinstance(config.pad_token_id, int) and config.pad_token_id < 0:
        changes.append(f"pad_token_id {config.pad_token_id} removed: it is no token")
        _unset(config, ["pad_token_id"])
    return changes


def _set(config: GenerationConfig, neutral: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with another value than the neutral one, and their values."""
    values = {name: getattr(config, name, None) for name in neutral}
    return {name: value for name, value in values.items() if value is not None and value != neutral[name]}


def _unset(config: GenerationConfig, names: Any) -> None:
    for name in names:
        setattr(config, name, None)
