"""The tokenizer and the model that a run starts from: with weights to be trained, or without, to be checked."""

from __future__ import annotations

import itertools

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.model import ModelSettings, TokenizerTraining
from alignlab.config.run import RunConfig
from alignlab.data.dataset import BadRows
from alignlab.data.prompts import split_row
from alignlab.data.rows import plain_row
from alignlab.data.sources import load_rows
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.data.vocabulary import num_token_ids
from alignlab.models.adapters import add_lora
from alignlab.models.hub.adapter_files import adapter_config, check_adapter_shapes, is_adapter
from alignlab.models.hub.checkpoints import empty_model, load_model, load_tokenizer, new_model
from alignlab.models.hub.packaged import resolve_checkpoint
from alignlab.models.layer_pruning import chosen_layers, student_from
from alignlab.runs.folder import refuse_run
from alignlab.types import message_text


def model_dtype(settings: ModelSettings) -> torch.dtype:
    """Return the dtype of a run's weights: "auto" is bfloat16 under an adapter, float32 where all weights train."""
    if settings.dtype == "auto":
        return torch.float32 if settings.lora is None else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]


def make_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the config names, or train one on the training data's prompts and answers."""
    settings = config.model
    if settings.name is not None:
        refuse_run(settings.name, "model.name")
    if not isinstance(settings.tokenizer, TokenizerTraining):
        name = settings.tokenizer or settings.name
        assert name is not None, "the config's rules require one of the two"
        return load_tokenizer(name)
    column = config.warm_start.answer_column if config.warm_start else "answer"
    texts = []
    bad_rows = BadRows(config.data.rendering)
    for index, row in enumerate(itertools.islice(load_rows(config.data), settings.tokenizer.num_texts)):
        with bad_rows.at(index):
            text, columns = split_row(plain_row(row), config.data.prompt_column)
            texts.append(f"{message_text(text)}{columns.get(column, '')}")
    return train_tokenizer(texts, vocab_size=settings.tokenizer.vocab_size)


def make_model(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel | PeftModel:
    """Load the model that the config names, or some of its layers; or make a new, random one.

    A new model's weights come from torch's global generator.
    """
    if settings.name is None:
        return _new_model(settings, tokenizer, dtype)
    model = load_model(settings.name, dtype=dtype)
    return model if settings.student is None else _student_of(model, settings)


def make_empty_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the model of `make_model` without its weights, its tensors on the meta device; of an adapter, its base.

    Raises:
        ConfigError, CheckpointError: the model cannot be loaded.
    """
    if settings.name is None:
        with init_empty_weights():
            return _new_model(settings, tokenizer, torch.float32)
    model = empty_model(settings.name)
    return model if settings.student is None else _student_of(model, settings)


def trained_part_of(settings: ModelSettings, empty: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """Return an empty model with the adapter that is trained, or in float32 where all weights train.

    Raises:
        CheckpointError: the tensors of an adapter's file do not fit its config and its base.
    """
    if settings.lora is not None:
        return add_lora(empty, settings.lora)
    path = None if settings.name is None else resolve_checkpoint(settings.name)
    if path is None or not is_adapter(path):
        return empty.float()
    adapter = adapter_config(path)
    adapter.inference_mode = False  # training goes on with it
    model = get_peft_model(empty, adapter)
    assert isinstance(model, PeftModel)
    check_adapter_shapes(model, path)
    return model


def _new_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    assert settings.architecture is not None, "the config's rules require a name or an architecture"
    return new_model(
        settings.architecture, vocab_size=num_token_ids(tokenizer), dtype=dtype,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )


def _student_of(teacher: PreTrainedModel | PeftModel, settings: ModelSettings) -> PreTrainedModel:
    """Return the layers of the teacher that the student begins with."""
    assert settings.student is not None
    return student_from(teacher, chosen_layers(teacher, settings.student.layers, settings.student.num_layers))
