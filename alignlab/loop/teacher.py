"""Teachers of distillation: frozen models whose log-probs or distributions a student learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.distill import TeacherSettings
from alignlab.config.trainers import OnlineConfig
from alignlab.data.vocabulary import num_token_ids
from alignlab.errors import ConfigError
from alignlab.loop.online_inputs import OnlineInputs
from alignlab.loop.preflight import with_room
from alignlab.models.decoder import output_head
from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.models.policy import Policy
from alignlab.runs.folder import refuse_run
from alignlab.types import Experience, Prompt


def load_teacher(
    settings: TeacherSettings, device: torch.device, *, chunk_tokens: int | None, num_ids: int | None = None
) -> Policy:
    """Load the teacher on `device`, frozen and in evaluation mode.

    Args:
        num_ids: number of the tokenizer's ids, to which the teacher's distribution is restricted: rows that pad its
            vocabulary get no probability. See `Policy`.

    Raises:
        CheckpointError: it cannot be loaded.
        NumericsError: a weight of the teacher is not finite.
    """
    default_dtype = "float32" if device.type == "cpu" else "bfloat16"
    dtype = default_dtype if settings.dtype == "auto" else settings.dtype
    model = load_model(settings.name, dtype=getattr(torch, dtype), device=device)
    check_finite(model.named_parameters(), f"the weights of the teacher {settings.name}", fix=TAKE_ANOTHER)
    return Policy(model, chunk_tokens=chunk_tokens, num_ids=num_ids).requires_grad_(False).eval()


def load_teacher_tokenizer(settings: TeacherSettings) -> PreTrainedTokenizerBase:
    """Load the teacher's tokenizer.

    Raises:
        ConfigError, CheckpointError: it cannot be loaded, or the teacher is the folder of a run.
    """
    refuse_run(settings.name, "teacher.name")
    return load_tokenizer(settings.name)


def check_same_tokens(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raise if teacher and student have different ids for a token.

    Raises:
        ConfigError: with a token that has another id, or is in one vocabulary only.
    """
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    if teacher_ids == student_ids:
        return
    differing = min(
        token for token in {*teacher_ids, *student_ids} if teacher_ids.get(token) != student_ids.get(token)
    )
    raise ConfigError(
        f"the teacher must have the student's tokenizer for its tokens to be judged one by one, and {differing!r} is "
        f"{teacher_ids.get(differing, 'unknown')} to the teacher and {student_ids.get(differing, 'unknown')} to the "
        "student; use another "
        "teacher, or alignment: text for on-policy distillation"
    )


def readable_part(pack: Experience, num_ids: int, *, with_first_unknown: bool) -> Experience:
    """Return the pack with each completion's mask cut at its first unreadable id, i.e. one >= `num_ids`.

    A student with a padded vocabulary may sample such an id, and the teacher cannot judge the tokens after it.

    Args:
        with_first_unknown: keep that id in the mask: the teacher predicts its position from ids that it can read.
    """
    unreadable = (pack.tokens >= num_ids).long()
    if not bool(unreadable.any()):
        return pack
    count = torch.cat([segment.cumsum(0) for segment in unreadable.split(pack.segments.lengths)])
    count_before = count - unreadable if with_first_unknown else count
    return replace(pack, completion_mask=pack.completion_mask & (count_before == 0))


def readable_tokens(tokens: Tensor, num_ids: int) -> Tensor:
    """Return the tokens [N] with 0 in place of each that a teacher of `num_ids` ids cannot read."""
    return torch.where(tokens < num_ids, tokens, 0)


def check_width(teacher: PreTrainedModel, student: PreTrainedTokenizerBase, *, rows: int | None = None) -> None:
    """Raise if the teacher lacks a logit for an id of the student's tokenizer. Logits of padding may be more or fewer.

    Args:
        rows: number of rows of the student's embedding table, if tokenizer ids beyond them cannot occur.

    Raises:
        ConfigError: with the two numbers.
    """
    width, needed = output_head(teacher)[0].shape[0], num_token_ids(student)
    needed = needed if rows is None else min(needed, rows)
    if width < needed:
        raise ConfigError(
            f"the teacher has {width} logits, and must have one for each of the {needed} ids of the student's "
            "tokenizer; use a teacher with the student's vocabulary"
        )


def prompts_with_room(
    inputs: OnlineInputs, teacher: Policy, config: OnlineConfig, *, tokenizer: PreTrainedTokenizerBase,
    read_as: Sequence[Sequence[int]] | None = None,
) -> Sequence[Prompt]:
    """Return the prompts that, with their completions, also fit the teacher; see `with_room`."""
    return with_room(
        inputs.prompts, teacher.model, config, inputs.render_settings, whose="the teacher", tokenizer=tokenizer,
        read_as=read_as,
    )
