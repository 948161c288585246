"""One text under two tokenizers: spans of it that both cut out whole.

The log-prob of a span is the sum over its tokens, so that a teacher can judge a student that writes in other tokens.
What that is worth:
- A span's probability under one way to tokenise it is a lower bound of the text's, which other ways share in. A teacher
  is asked for the tokens that its own tokenizer gives the whole completion, the likeliest way in general.
- The student's end token is set against the teacher's: the token that its chat template writes after an assistant's
  message, or its eos token where there is none. No other special token has a like.
- The teacher reads the prompt through its own chat template.
- A completion whose bytes are no text (half a character), or which the teacher's tokenizer changes, is not aligned;
  nor is one that with its prompt is longer in the teacher's tokens than the teacher has positions.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.render import RenderSettings
from alignlab.data.messages import BadRow
from alignlab.data.rendering import PromptRenderer
from alignlab.errors import ConfigError, DataError
from alignlab.types import Completion, Prompt

_BYTE_LEVEL, _BYTE_FALLBACK = "ByteLevel", "ByteFallback"
_SPACE = "▁"  # the space of a tokenizer of the SentencePiece kind


@dataclass(frozen=True)
class AlignedCompletion:
    """A completion in the student's and in the teacher's tokens.

    Attributes:
        spans: of each of the student's tokens, the span that it is in, ascending from 0.
        teacher_ids: the teacher's tokens.
        teacher_spans: of each of them, the span.
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
    """The finest cut of a text into spans that both tokenisations respect.

    Args:
        student_ends, teacher_ends: offset in the text, in bytes, at which each token ends; not descending, and both end
            where the text ends. A token of no bytes ends where the one before it does, and is in its span.

    Returns:
        The span of each of the student's tokens, and of each of the teacher's, counted from 0. Every span has tokens of
        both.
    """
    assert student_ends and teacher_ends and student_ends[-1] == teacher_ends[-1]
    shared = sorted(set(student_ends) & set(teacher_ends))
    first, second = (tuple(bisect_left(shared, end) for end in ends) for ends in (student_ends, teacher_ends))
    return first, second


class TokenBytes:
    """The bytes that each token of a tokenizer writes: exact, where decoding one token alone would not be.

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
        """Whether the token stands for something else than text."""
        return token in self._special or (token in self._added and self._added[token].special)

    def __call__(self, token_ids: Sequence[int]) -> list[bytes] | None:
        """The bytes of each token; None where one is special, or in no vocabulary."""
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
    """Prompts and completions of a student's, in its teacher's tokens.

    Args:
        student: the tokenizer that completions are sampled in.
        teacher: the other.
        settings: how prompts are rendered; the chat template is the teacher's.

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
        """What the teacher writes where its answer ends."""
        if self._render.chat:
            answer = "An answer."
            try:
                messages = [*self._render.messages("A question?"), {"role": "assistant", "content": answer}]
                _, answered, after = self._render.render_chat(messages, generation=False).rpartition(answer)
            except BadRow as error:
                raise ConfigError(f"the teacher's chat template must render an answer, and it {error}") from error
            written = answered and after.strip()
            ids = self._teacher(after.strip(), add_special_tokens=False)["input_ids"] if written else []
            if ids and self._teacher_bytes.is_special(ids[0]):
                return int(ids[0])
        if self._teacher.eos_token_id is None:
            raise ConfigError("a student's end is set against the teacher's eos token, and it has none; set eos_token")
        return int(self._teacher.eos_token_id)

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """What the teacher is fed for each prompt.

        Raises:
            ConfigError: its chat template leaves the settings' system prompt or tools out.
            DataError: its chat template refuses a prompt or leaves something of it out, or a prompt comes to no tokens.
        """
        texts = []
        for prompt in prompts:
            try:
                texts.append(self._render.of_row(prompt.columns, prompt.index)(prompt.text))
            except BadRow as error:
                raise DataError(f"the prompt of row {prompt.index} {error}; correct it for the teacher") from error
            except ConfigError as error:
                raise ConfigError(f"the teacher's tokenizer: {error}") from error
        found = self._render.encode(texts)
        empty = [prompt.index for prompt, ids in zip(prompts, found, strict=True) if not ids]
        if empty:
            raise DataError(f"the prompt of row {empty[0]} has no token of the teacher's, and needs one; drop the row")
        return found

    def completion(self, completion: Completion, *, room: int | None = None) -> AlignedCompletion | None:
        """A completion in both tokenisations; None where they do not write the same text, or the teacher has no room.

        Args:
            room: the most tokens of its own that the teacher can read after the prompt; None for any number.
        """
        aligned = self._with_end(completion)
        return None if aligned and room is not None and len(aligned.teacher_ids) > room else aligned

    def _with_end(self, completion: Completion) -> AlignedCompletion | None:
        written = completion.token_ids
        ended = completion.finish_reason == "stop" and self._student_bytes.is_special(written[-1])
        aligned = self._written(written[:-1] if ended else written)
        if aligned is None or not ended:
            return aligned
        last = aligned.num_spans
        return AlignedCompletion(
            (*aligned.spans, last),
            (*aligned.teacher_ids, self._end),
            (*aligned.teacher_spans, last),
        )

    def _written(self, token_ids: Sequence[int]) -> AlignedCompletion | None:
        """Tokens of text in both tokenisations."""
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
        """The bytes of the teacher's tokens; None where they are not the text's."""
        pieces, wanted = self._teacher_bytes(teacher_ids), text.encode()
        if pieces and pieces[0].startswith(b" ") and b"".join(pieces) == b" " + wanted:
            pieces[0] = pieces[0][1:]  # a space that some tokenizers put before any text
        return pieces if pieces is not None and b"".join(pieces) == wanted else None


def _text(pieces: Sequence[bytes]) -> str | None:
    """What the tokens write; None where it is no text."""
    try:
        return b"".join(pieces).decode()
    except UnicodeDecodeError:
        return None


def _ends(pieces: Sequence[bytes]) -> list[int]:
    return list(accumulate(len(piece) for piece in pieces))


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Kinds of the steps by which a fast tokenizer makes text of tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    if decoder is None:
        return set()
    told: dict[str, Any] = json.loads(decoder.__getstate__())
    return {str(step["type"]) for step in (told, *told.get("decoders", ()))}


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al. 2019, GPT-2).

    Bytes that print stand for themselves; the others, in order, for the characters from 256 on.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}
