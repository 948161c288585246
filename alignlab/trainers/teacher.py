"""A teacher: a frozen model that is asked how likely it finds what a student wrote."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.teacher import TeacherSettings
from alignlab.data.vocabulary import num_token_ids
from alignlab.errors import ConfigError
from alignlab.models.attention import output_head
from alignlab.models.checkpoints import load_model
from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.models.policy import Policy
from alignlab.types import Experience


def load_teacher(
    settings: TeacherSettings, device: torch.device, *, chunk_tokens: int, num_ids: int | None = None
) -> Policy:
    """Load the teacher on `device`, frozen and in evaluation mode.

    Args:
        num_ids: see `Policy`: ids of the tokenizer, where the teacher's probability is not to be lost to rows that pad
            its vocabulary.

    Raises:
        NumericsError: a weight of it is not finite.
    """
    precise = device.type == "cpu"
    name = settings.dtype if settings.dtype != "auto" else "float32" if precise else "bfloat16"
    model = load_model(settings.name, dtype=getattr(torch, name), device=device)
    check_finite(model.named_parameters(), f"the weights of the teacher {settings.name}", fix=TAKE_ANOTHER)
    return Policy(model, chunk_tokens=chunk_tokens, num_ids=num_ids).requires_grad_(False).eval()


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


def readable_part(pack: Experience, num_ids: int, *, with_first_unknown: bool) -> Experience:
    """Return the pack with each completion's mask cut at the first id from `num_ids` on, which the teacher cannot read.

    A student whose table is padded may draw such an id, and what follows it cannot be judged.

    Args:
        with_first_unknown: leave that id in the mask: its place is predicted from ids that the teacher can read.
    """
    unknown = (pack.tokens >= num_ids).long()
    if not bool(unknown.any()):
        return pack
    up_to_here = torch.cat([part.cumsum(0) for part in unknown.split(pack.segments.lengths)])
    unread = up_to_here - unknown if with_first_unknown else up_to_here
    return replace(pack, completion_mask=pack.completion_mask & (unread == 0))


def readable_tokens(tokens: Tensor, num_ids: int) -> Tensor:
    """Return the tokens [N] with another one in the place of each that a teacher of `num_ids` ids cannot read."""
    return torch.where(tokens < num_ids, tokens, 0)


def check_width(teacher: PreTrainedModel, student: PreTrainedTokenizerBase, *, rows: int | None = None) -> None:
    """Raise if the teacher lacks a logit for an id that the student can read and write. Models pad their vocabulary:
    logits beyond those may be more or fewer.

    Args:
        rows: of the student's embedding table, where ids of its tokenizer beyond them cannot come up.

    Raises:
        ConfigError: it lacks one.
    """
    width, needed = output_head(teacher)[0].shape[0], num_token_ids(student)
    needed = needed if rows is None else min(needed, rows)
    if width < needed:
        raise ConfigError(
            f"the teacher has {width} logits, and must have one for each of the {needed} ids of the student's "
            "tokenizer; use a teacher with the student's vocabulary"
        )


