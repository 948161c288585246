"""A teacher: a frozen model that is asked how likely it finds what a student wrote."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.teacher import TeacherSettings
from alignlab.errors import ConfigError
from alignlab.models.attention import output_head
from alignlab.models.checkpoints import load_model
from alignlab.models.policy import Policy


def load_teacher(settings: TeacherSettings, device: torch.device, *, chunk_tokens: int) -> Policy:
    """The teacher on `device`, frozen and in evaluation mode."""
    precise = device.type == "cpu"
    name = settings.dtype if settings.dtype != "auto" else "float32" if precise else "bfloat16"
    model = load_model(settings.name, dtype=getattr(torch, name), device=device)
    return Policy(model, chunk_tokens=chunk_tokens).requires_grad_(False).eval()


def check_same_tokens(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """See that ids mean the same to both.

    Raises:
        ConfigError: a token has another id, or is in one vocabulary only.
    """
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs == ours:
        return
    other = min(token for token in {*theirs, *ours} if theirs.get(token) != ours.get(token))
    raise ConfigError(
        f"the teacher must have the student's tokenizer for its tokens to be judged one by one, and {other!r} is "
        f"{theirs.get(other, 'unknown')} to the teacher and {ours.get(other, 'unknown')} to the student; use another "
        "teacher, or alignment: text for on-policy distillation"
    )


def check_width(teacher: PreTrainedModel, student: PreTrainedTokenizerBase) -> None:
    """See that the teacher has a logit for every id of the student's tokenizer. Models pad their vocabulary: logits
    beyond it may be more or fewer.

    Raises:
        ConfigError: it has not.
    """
    width, needed = output_head(teacher)[0].shape[0], max(student.get_vocab().values()) + 1
    if width < needed:
        raise ConfigError(
            f"the teacher has {width} logits, and must have one for each of the {needed} ids of the student's "
            "tokenizer; use a teacher with the student's vocabulary"
        )


