"""Alignment of a text under two tokenizers: spans of the text that begin and end at token boundaries of both.

The log-prob of a span is the sum over its tokens, so that a teacher can score a student with another tokenizer.
Assumptions and limits:
- The probability of a span under one tokenisation is a lower bound of the text's probability, to which other
  tokenisations contribute. The teacher scores the tokens that its tokenizer makes of the whole completion, in general
  the likeliest tokenisation.
- The student's end token is aligned with the teacher's: the token that the teacher's chat template writes after an
  assistant's message, or its eos token without a chat template. No other special token is aligned.
- The teacher reads the prompt through its own chat template.
- A completion is not aligned if its bytes are no text (half a character), if the teacher's tokenizer changes the text,
  or if it has, with its prompt, more tokens of the teacher than the teacher has positions.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.rendering import PromptRenderer
from alignlab.errors import ConfigError, DataError
from alignlab.types import Completion, Prompt

_BYTE_LEVEL, _BYTE_FALLBACK = "ByteLevel", "ByteFallback"
_SPACE = "▁"  # how tokenizers of the SentencePiece kind write a space


@dataclass(frozen=True)
class AlignedCompletion:
    """A completion in the tokens of the student and of the teacher.

    Attributes:
        spans: index of the span of each of the student's tokens, ascending from 0.
        teacher_ids: the teacher's tokens.
        teacher_spans: index of the span of each of the teacher's tokens.
    """

    spans: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    teacher_spans: tuple[int, ...]

    @property
    def num_spans(self) -> int:
        return self.spans[-1] + 1 if self.spans else 0


def aligned_spans(
    student_ends: Sequence[int], teacher_ends: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the span of each of the student's tokens, and of each of the teacher's, from 0.

    The spans are the shortest possible ones; every span has tokens of both.

    Args:
        student_ends, teacher_ends: offset in the text, in bytes, at which each token ends; not descending, and the last
            is the length of the text. A token of no bytes is in the span of the token before it.
    """
    assert student_ends and teacher_ends and student_ends[-1] == teacher_ends[-1]
    shared = sorted(set(student_ends) & set(teacher_ends))
    first, second = (tuple(bisect_left(shared, end) for end in ends) for ends in (student_ends, teacher_ends))
    return first, second


class TokenBytes:
    """Converts tokens to bytes exactly, which decoding one token alone does not.

    Raises:
        ConfigError: the tokenizer is neither a byte-level one nor of the SentencePiece kind with a byte fallback.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = dict(tokenizer.added_tokens_decoder)
        self._special = set(tokenizer.all_special_ids)
        kinds = _decoders(tokenizer)
        if not {_BYTE_LEVEL, _BYTE_FALLBACK} & kinds:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} must be a byte-level one, or have "
                "a byte fallback, for its tokens to be aligned with another's text; use a teacher with the student's "
                "tokenizer"
            )
        self._byte_level = _BYTE_LEVEL in kinds
        self._bytes = _bytes_of_characters()

    def is_special(self, token: int) -> bool:
        """Return True if a token stands for something else than text."""
        return token in self._special or (token in self._added and self._added[token].special)

    def __call__(self, token_ids: Sequence[int]) -> list[bytes] | None:
        """Return the bytes of each token; None if one is special or unknown."""
        if any(self.is_special(token) for token in token_ids):
            return None
        pieces = self._tokenizer.convert_ids_to_tokens(list(token_ids))
        if any(piece is None for piece in pieces):
            return None
        return [self._of(token, piece) for token, piece in zip(token_ids, pieces, strict=True)]

    def _of(self, token: int, piece: str) -> bytes:
        if token in self._added:
            return str(self._added[token].content).encode()
        if self._byte_level:
            return bytes(self._bytes[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()


class TextAligner:
    """Converts prompts and completions of a student to the tokens of its teacher.

    Args:
        student: tokenizer of the model that samples the completions.
        teacher: tokenizer of the teacher.
        settings: how prompts are rendered, through the teacher's chat template.

    Raises:
        ConfigError: one of the tokenizers cannot be aligned, or the settings do not fit the teacher's.
    """

    def __init__(
        self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, settings: RenderSettings
    ) -> None:
        self._teacher = teacher
        self._student_bytes, self._teacher_bytes = TokenBytes(student), TokenBytes(teacher)
        try:
            self._render = PromptRenderer(settings, teacher)
        except ConfigError as error:
            raise ConfigError(f"the teacher's tokenizer: {error}") from error
        self._end = self._end_token()

    def _end_token(self) -> int:
        """Return the token that the teacher writes at the end of an answer."""
        if self._render.chat:
            answer = "An answer."
            try:
                messages = [*self._render.messages("A question?"), {"role": "assistant", "content": answer}]
                _, answered, after = self._render.render_chat(messages, generation=False).rpartition(answer)
            except BadRow as error:
                raise ConfigError(f"the teacher's chat template must render an answer, and it {error}") from error
            ending = after.strip() if answered else ""
            ids = self._teacher(ending, add_special_tokens=False)["input_ids"] if ending else []
            if ids and self._teacher_bytes.is_special(ids[0]):
                return int(ids[0])
        if self._teacher.eos_token_id is None:
            raise ConfigError("a student's end is set against the teacher's eos token, and it has none; set eos_token")
        return int(self._teacher.eos_token_id)

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Return the teacher's tokens of each prompt.

        Raises:
            ConfigError: the teacher's chat template leaves the settings' system prompt or tools out.
            DataError: the teacher's chat template refuses a prompt or leaves a part of it out, or a prompt has no
                tokens.
        """
        texts = []
        for prompt in prompts:
            try:
                texts.append(self._render.of_row(prompt.columns, prompt.index)(prompt.text))
            except BadRow as error:
                raise DataError(f"the prompt of row {prompt.index} {error}; correct it for the teacher") from error
            except ConfigError as error:
                raise ConfigError(f"the teacher's tokenizer: {error}") from error
        token_ids = self._render.encode(texts)
        empty = [prompt.index for prompt, ids in zip(prompts, token_ids, strict=True) if not ids]
        if empty:
            raise DataError(f"the prompt of row {empty[0]} has no token of the teacher's, and needs one; drop the row")
        return token_ids

    def completion(self, completion: Completion, *, room: int | None = None) -> AlignedCompletion | None:
        """Return a completion in both tokenisations; None if it cannot be aligned or the teacher has no room for it.

        Args:
            room: largest number of its tokens that the teacher can read after the prompt; None for no limit.
        """
        aligned = self._with_end(completion)
        return None if aligned and room is not None and len(aligned.teacher_ids) > room else aligned

    def _with_end(self, completion: Completion) -> AlignedCompletion | None:
        token_ids = completion.token_ids
        has_end = completion.finish_reason == "stop" and self._student_bytes.is_special(token_ids[-1])
        aligned = self._without_end(token_ids[:-1] if has_end else token_ids)
        if aligned is None or not has_end:
            return aligned
        last = aligned.num_spans
        return AlignedCompletion(
            (*aligned.spans, last),
            (*aligned.teacher_ids, self._end),
            (*aligned.teacher_spans, last),
        )

    def _without_end(self, token_ids: Sequence[int]) -> AlignedCompletion | None:
        """Return tokens of text, without an end token, in both tokenisations; None if they cannot be aligned."""
        if not token_ids:
            return AlignedCompletion((), (), ())
        pieces = self._student_bytes(token_ids)
        text = None if pieces is None else _text(pieces)
        if pieces is None or not text:
            return None
        teacher_ids = tuple(self._teacher(text, add_special_tokens=False)["input_ids"])
        teacher_pieces = self._teacher_pieces(text, teacher_ids)
        if teacher_pieces is None:
            return None
        spans, teacher_spans = aligned_spans(_ends(pieces), _ends(teacher_pieces))
        return AlignedCompletion(spans, teacher_ids, teacher_spans)

    def _teacher_pieces(self, text: str, teacher_ids: Sequence[int]) -> list[bytes] | None:
        """Return the bytes of the teacher's tokens; None if they are other bytes than those of the text."""
        pieces, text_bytes = self._teacher_bytes(teacher_ids), text.encode()
        if pieces and pieces[0].startswith(b" ") and b"".join(pieces) == b" " + text_bytes:
            pieces[0] = pieces[0][1:]  # some tokenizers put a space before any text
        return pieces if pieces is not None and b"".join(pieces) == text_bytes else None


def _text(pieces: Sequence[bytes]) -> str | None:
    """Return the text of the bytes; None if they are no text."""
    try:
        return b"".join(pieces).decode()
    except UnicodeDecodeError:
        return None


def _ends(pieces: Sequence[bytes]) -> list[int]:
    return list(accumulate(len(piece) for piece in pieces))


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the types of the steps by which a fast tokenizer decodes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    if decoder is None:
        return set()
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    return {str(step["type"]) for step in (state, *state.get("decoders", ()))}


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary (Radford et al. 2019, GPT-2).

    Printable bytes are written as themselves; the others, in order, as the characters from 256 on.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    not_printing = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(not_printing)}
