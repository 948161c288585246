"""Checks before the first step that the run can end well: saving, reading back, disk space, the report's curves."""

from __future__ import annotations

import importlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.trainers import RewardConfig, RLAIFConfig, TrainerConfig, stages_of
from alignlab.data.vocabulary import check_end_token
from alignlab.errors import AlignlabError, CheckpointError, ConfigError
from alignlab.files.paths import RunPaths
from alignlab.loop.master_weights import state_bytes
from alignlab.loop.preflight import check_prompt_ids
from alignlab.models.decoder import causal_lm, end_ids, num_embeddings
from alignlab.models.hub.checkpoints import is_adapter, save_model
from alignlab.models.hub.reward_checkpoints import padded_tokenizer, try_reward_model
from alignlab.models.hub.saving import SAVING_ERRORS, saving
from alignlab.models.pieces import whole_bytes
from alignlab.runs.folder import check_place
from alignlab.runs.metrics import check_trackers
from alignlab.types import Prompt

logger = logging.getLogger(__name__)
Model = PreTrainedModel | PeftModel
DRAWING = ("matplotlib.figure", "matplotlib.backends.backend_agg")
GIB = 2**30


def check_ending(
    config: TrainerConfig, model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path,
    write: Callable[[Path], None], *, trained: Iterable[nn.Parameter] | None = None, more_bytes: int = 0,
) -> None:
    """Raise if the run could not end well: try all that its end needs, without writing the weights.

    Args:
        model: in training, with or without its weights.
        folder: folder of the run, which need not exist.
        write: writes the trained model and its tokenizer to a folder, without the weights.
        trained: all parameters in training, with those of a critic; default: the model's.
        more_bytes: of a checkpoint, beside these weights and their optimizer's state.

    Raises:
        ConfigError: a tracker or matplotlib is missing, the folder cannot be written, or the disk has too little room.
        CheckpointError: the model or its tokenizer cannot be saved, or cannot be read back.
    """
    check_saving(config, model, tokenizer, write)
    trained = (p for p in model.parameters() if p.requires_grad) if trained is None else trained
    check_disk(config, model, folder, sum(whole_bytes(p) + state_bytes(p) for p in trained) + more_bytes)


def on_main_rank(check: Callable[[], None]) -> None:
    """Run a check on the main rank, the only one that writes files, and raise on every rank if it fails.

    Raises:
        AlignlabError: the error of the check; on the other ranks a CheckpointError that refers to rank 0.
    """
    state, error = PartialState(), None
    if state.is_main_process:
        try:
            check()
        except AlignlabError as check_error:
            error = check_error
    failed = reduce(torch.tensor(float(error is not None), device=state.device))
    if error is not None:
        raise error
    if failed > 0:
        raise CheckpointError("the run could not end well, and does not start: see the message of rank 0")


def check_saving(
    config: TrainerConfig, model: Model, tokenizer: PreTrainedTokenizerBase, write: Callable[[Path], None]
) -> None:
    """Raise as `check_ending` does, except for the run's folder and its disk."""
    check_trackers(config.trackers)
    check_drawing()
    ends = end_ids(model)
    # Other programs stop only at the end tokens of the generation config, where it has some.
    check_end_token(tokenizer, num_embeddings(model), end_ids(model, ("generation_config",)) or ends)
    warn_of_unnamed_base(model)
    try_saving(write, tokenizer)


def check_stages(
    config: RLAIFConfig, model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> None:
    """Raise if the model cannot read the prompts of RLAIF, or the output of one of its stages could not be saved.

    Each stage checks the disk at its start, when it is known whether an adapter is trained.

    Raises:
        ConfigError, CheckpointError: see `check_prompt_ids`, `check_saving`.
    """
    check_prompt_ids(model, prompts, tokenizer)
    on_main_rank(lambda: _check_saving_of_stages(config, model, tokenizer))


def _check_saving_of_stages(config: RLAIFConfig, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    for stage in stages_of(config):
        check_saving(stage, model, tokenizer, writer_of(stage, model, tokenizer))


def writer_of(stage: TrainerConfig, model: Model, tokenizer: PreTrainedTokenizerBase) -> Callable[[Path], None]:
    """Return a function that writes the model of a stage without weights: a language model or a reward model."""
    if isinstance(stage, RewardConfig):
        padded = padded_tokenizer(tokenizer)
        return lambda path: try_reward_model(model, path, padded)
    return lambda path: write_without_weights(model, tokenizer, path)


def write_without_weights(model: Model, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a language model as `TrainingLoop.write_model` does, without its weights."""
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
    """Write to a temporary folder what the run saves at its end, without weights, and read it back.

    Raises:
        CheckpointError: writing or reading back fails.
        DiskError: the temporary folder has no room, or cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="alignlab-save-") as temporary:
        folder = Path(temporary) / "model"
        with saving("the model or its tokenizer", folder):
            write(folder)
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
    _warn_of_changed_tokenizer(saved, tokenizer)


def _warn_of_changed_tokenizer(saved: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if the tokenizer that was read back differs from the one in training."""
    read_back_and_before = {
        "vocabulary": (saved.get_vocab(), tokenizer.get_vocab()),
        "chat template": (saved.chat_template, tokenizer.chat_template),
        "end token": (saved.eos_token, tokenizer.eos_token),
    }
    differences = [name for name, (after, before) in read_back_and_before.items() if after != before]
    if differences:
        logger.warning(
            "the tokenizer differs after it was saved and read back: its %s; the trained model will be used with the "
            "saved one", ", ".join(differences),
        )  # fmt: skip


def warn_of_unnamed_base(model: Model) -> None:
    """Warn if the saved adapter will not name a base model that can be loaded."""
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


def check_disk(config: TrainerConfig, model: Model, folder: Path, checkpoint_bytes: int) -> None:
    """Raise if the run's folder cannot be written, or the disk has no room for its checkpoints and its model.

    Args:
        checkpoint_bytes: size of the weights in training and of their optimizer's state.

    Raises:
        ConfigError: with the space that is needed and the space that is free.
    """
    place = check_place(folder)
    needed = needed_bytes(config, model, checkpoint_bytes) - _held_bytes(folder)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"the run needs about {needed / GIB:.1f} GiB for {num_checkpoints(config)} checkpoints and its model, "
            f"and the disk of {place} has {free / GIB:.1f} GiB free; free some, lower trainer.checkpoints.keep, or "
            "choose another trainer.output_dir"
        )


def needed_bytes(config: TrainerConfig, model: Model, checkpoint_bytes: int) -> int:
    """Return the bytes of a run's checkpoints (weights in training and Adam's two moments) and of its saved models."""
    saved = [p for p in model.parameters() if p.requires_grad or not isinstance(model, PeftModel)]
    checkpoints = num_checkpoints(config)
    models = 1 + (checkpoints if config.checkpoints.with_model else 0)
    return checkpoints * checkpoint_bytes + models * sum(map(whole_bytes, saved))


def num_checkpoints(config: TrainerConfig) -> int:
    """Return the largest number of checkpoints on the disk at one time: those kept, with that of the best evaluation,
    and one that is being written."""
    every = config.checkpoints.every_steps or config.num_steps
    regular = min(-(-config.num_steps // every), config.checkpoints.keep + 1)
    if config.early_stopping is None or config.eval_every_steps is None:
        return regular
    evaluations = -(-config.num_steps // config.eval_every_steps)  # each may be the best so far, and is saved then
    return min(regular + evaluations, config.checkpoints.keep + 2)


def _held_bytes(folder: Path) -> int:
    """Return the bytes of the checkpoints that a resumed run has on the disk already.

    An earlier saved model does not count: the new one is written beside it.
    """
    return sum(path.stat().st_size for path in RunPaths(folder).checkpoints.rglob("*") if path.is_file())
