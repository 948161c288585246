"""The tokenizer and the model that a run starts from."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.model import ModelSettings, TokenizerTraining
from alignlab.config.run import RunConfig
from alignlab.data.dataset import BadRows
from alignlab.data.prompts import split_row
from alignlab.data.rows import plain_row
from alignlab.data.sources import load_rows
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.data.vocabulary import num_token_ids
from alignlab.models.empty import loads_weights
from alignlab.models.hub.checkpoints import load_model, load_tokenizer, new_model
from alignlab.models.layer_pruning import chosen_layers, student_from
from alignlab.runs.folder import refuse_run
from alignlab.types import message_text


def model_dtype(settings: ModelSettings) -> torch.dtype:
    """Return the dtype of a run's weights: "auto" is bfloat16 under an adapter, float32 where all weights train."""
    if settings.dtype == "auto":
        return torch.float32 if settings.lora is None else torch.bfloat16
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


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
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> PreTrainedModel | PeftModel:
    """Load the model that the config names, or some of its layers; or make a new, random one.

    A new model's weights come from torch's global generator.

    Args:
        device: onto which an existing model's weights are read, tensor by tensor; others are made on the host.
    """
    if settings.name is None:
        return _new_model(settings, tokenizer, dtype)
    if settings.student is not None:
        return _student_of(load_model(settings.name, dtype=dtype), settings)
    return load_model(settings.name, dtype=dtype, device=device, mtp=settings.mtp)


def _new_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    assert settings.architecture is not None, "the config's rules require a name or an architecture"
    with nullcontext() if loads_weights() else init_empty_weights():
        return new_model(
            settings.architecture, vocab_size=num_token_ids(tokenizer), dtype=dtype,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )


def _student_of(teacher: PreTrainedModel | PeftModel, settings: ModelSettings) -> PreTrainedModel:
    """Return the layers of the teacher that the student begins with."""
    assert settings.student is not None
    return student_from(teacher, chosen_layers(teacher, settings.student.layers, settings.student.num_layers))
