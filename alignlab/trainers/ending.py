"""What the end of a run needs, tried before its first step: saving, reading back, disk space, the report's curves."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.trainers import RewardConfig, RLAIFConfig, TrainerConfig, stages_of
from alignlab.data.vocabulary import check_end_token
from alignlab.errors import AlignlabError, CheckpointError, ConfigError
from alignlab.library_errors import writing
from alignlab.models.attention import causal_lm, end_ids, num_embeddings
from alignlab.models.checkpoints import is_adapter, save_model
from alignlab.models.reward_checkpoints import padded_tokenizer, try_reward_model
from alignlab.models.saving import SAVING_ERRORS, unsaveable
from alignlab.trainers.preflight import check_prompt_ids
from alignlab.training.metrics import check_trackers
from alignlab.types import Prompt

logger = logging.getLogger(__name__)
Model = PreTrainedModel | PeftModel
DRAWING = ("matplotlib.figure", "matplotlib.backends.backend_agg")
ADAM_MOMENTS = 2
GIB = 2**30


def check_ending(
    config: TrainerConfig, model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path,
    write: Callable[[Path], None], *, trained: Iterable[Tensor] | None = None,
) -> None:
    """Raise if the run could not end well: all that its end needs is tried, without writing the weights.

    Args:
        model: in training, with or without its weights.
        folder: of the run, which need not exist.
        write: writes what is trained and its tokenizer to a folder, all but the weights.
        trained: all parameters in training, a critic's too; default: the model's.

    Raises:
        ConfigError: a tracker or matplotlib is missing, the folder cannot be written, or the disk has too little room.
        CheckpointError: the model or its tokenizer cannot be saved, or not be read back.
    """
    check_saving(config, model, tokenizer, write)
    trained = (p for p in model.parameters() if p.requires_grad) if trained is None else trained
    check_disk(config, model, folder, sum(p.numel() * p.element_size() for p in trained))


def on_main_rank(check: Callable[[], None]) -> None:
    """Run a check on the main rank, which alone writes files, and raise on every rank where it fails.

    Raises:
        AlignlabError: the check's; on the other ranks one that says where to look.
    """
    state, error = PartialState(), None
    if state.is_main_process:
        try:
            check()
        except AlignlabError as found:
            error = found
    failed = reduce(torch.tensor(float(error is not None), device=state.device))
    if error is not None:
        raise error
    if failed > 0:
        raise CheckpointError("the run could not end well, and does not start: see the message of rank 0")


def check_saving(
    config: TrainerConfig, model: Model, tokenizer: PreTrainedTokenizerBase, write: Callable[[Path], None]
) -> None:
    """Raise as `check_ending` does, the run's folder and its disk aside."""
    check_trackers(config.trackers)
    check_drawing()
    ends = end_ids(model)
    # Generation by other programs stops at the generation defaults' ends alone, where these have some.
    check_end_token(tokenizer, num_embeddings(model), end_ids(model, ("generation_config",)) or ends)
    warn_of_unnamed_base(model)
    try_saving(write, tokenizer)


def check_stages(
    config: RLAIFConfig, model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> None:
    """Raise if the model cannot read the prompts of RLAIF, or what one of its stages makes could not be saved.

    Each stage looks at the disk when it starts, when it is known whether an adapter is trained.

    Raises:
        ConfigError, CheckpointError: see `check_prompt_ids`, `check_saving`.
    """
    check_prompt_ids(model, prompts, tokenizer)
    on_main_rank(lambda: _check_saving_of_stages(config, model, tokenizer))


def _check_saving_of_stages(config: RLAIFConfig, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    for stage in stages_of(config):
        check_saving(stage, model, tokenizer, writer_of(stage, model, tokenizer))


def writer_of(stage: TrainerConfig, model: Model, tokenizer: PreTrainedTokenizerBase) -> Callable[[Path], None]:
    """Return what writes all but the weights of what a trainer makes of a model: a language model or a reward model."""
    if isinstance(stage, RewardConfig):
        padded = padded_tokenizer(tokenizer)
        return lambda path: try_reward_model(model, path, padded)
    return lambda path: write_without_weights(model, tokenizer, path)


def write_without_weights(model: Model, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write what `TrainingLoop.write_model` writes of a language model, all but its weights."""
    save_model(model, path, weights=False)
    tokenizer.save_pretrained(path)


def check_drawing() -> None:
    """Raise if the curves of the report cannot be drawn.

    Raises:
        ConfigError: matplotlib cannot be imported.
    """
    for name in DRAWING:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"the report at the end of the run draws curves with matplotlib, which cannot be imported: {error}; "
                "pip install matplotlib"
            ) from error


def try_saving(write: Callable[[Path], None], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what is saved at the end, but its weights, to a temporary folder, and read it back.

    Raises:
        CheckpointError: one of the two fails.
        DiskError: the temporary folder has no room, or cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="alignlab-save-") as temporary:
        folder = Path(temporary) / "model"
        try:
            with writing(folder, "what the end of the run saves"):
                write(folder)
        except AlignlabError:
            raise
        except SAVING_ERRORS as error:
            raise unsaveable("the model or its tokenizer", error) from error
        _read_back(folder, tokenizer)


def _read_back(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        if not is_adapter(str(folder)):
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
        saved: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except SAVING_ERRORS as error:
        raise CheckpointError(
            "what the end of the run saves of the model's config and its tokenizer "
            f"({type(tokenizer).__name__}) cannot be read back: {error}\n"
            "Use a tokenizer that AutoTokenizer loads from its own folder; a class of your own is registered with "
            "AutoTokenizer.register"
        ) from error
    differences = [
        what
        for what, one, other in (
            ("vocabulary", saved.get_vocab(), tokenizer.get_vocab()),
            ("chat template", saved.chat_template, tokenizer.chat_template),
            ("end token", saved.eos_token, tokenizer.eos_token),
        )
        if one != other
    ]
    if differences:
        logger.warning(
            "the tokenizer is another after it was saved and read back: its %s; what is trained will be used with the "
            "saved one", ", ".join(differences),
        )  # fmt: skip


def warn_of_unnamed_base(model: Model) -> None:
    """Say where an adapter's folder will not name a base by which it can be loaded."""
    if not isinstance(model, PeftModel):
        return
    config: Any = model.peft_config[model.active_adapter]
    name = config.base_model_name_or_path or causal_lm(model).config.name_or_path
    if not name:
        logger.warning(
            "the model has no name, so that the saved adapter will not name its base: keep the base, and name it to "
            "alignlab merge, generate and eval by --model"
        )
    elif "/" in name and name.count("/") != 1 and not Path(name).is_dir():
        logger.warning("the saved adapter will name its base %s, and there is no such folder; keep the base", name)


def check_disk(config: TrainerConfig, model: Model, folder: Path, trained_bytes: int) -> None:
    """Raise if the run's folder cannot be written, or the disk has no room for its checkpoints and what it makes.

    Args:
        trained_bytes: of the weights in training.

    Raises:
        ConfigError: with how much is needed and free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"trainer.output_dir is {folder}, and {place} {'cannot be written' if place.is_dir() else 'is no folder'}; "
            "choose another trainer.output_dir"
        )
    needed = needed_bytes(config, model, trained_bytes) - _held_bytes(folder)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"the run needs about {needed / GIB:.1f} GiB for {num_checkpoints(config)} checkpoints and what it makes, "
            f"and the disk of {place} has {free / GIB:.1f} GiB free; free some, lower trainer.keep_checkpoints, or "
            "choose another trainer.output_dir"
        )


def needed_bytes(config: TrainerConfig, model: Model, trained_bytes: int) -> int:
    """Return the bytes of a run's checkpoints (weights in training and Adam's two moments) and of what it makes."""
    made = [p for p in model.parameters() if p.requires_grad or not isinstance(model, PeftModel)]
    checkpoints = num_checkpoints(config) * (1 + ADAM_MOMENTS) * trained_bytes
    return checkpoints + sum(p.numel() * p.element_size() for p in made)


def num_checkpoints(config: TrainerConfig) -> int:
    """Return how many checkpoints are on the disk at one time: those that stay, and one that is being written."""
    every = config.save_every_steps or config.num_steps
    return min(-(-config.num_steps // every), config.keep_checkpoints + 1)


def _held_bytes(folder: Path) -> int:
    """Bytes that a run which goes on has on the disk already, of what is counted.

    What it has made before is none of it: what it makes now is written beside that.
    """
    return sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
