"""The prompt of a pair without a column for it: the common beginning of `chosen` and `rejected`.

A prompt that ended in the middle of a word would leave the model tokens to write that natural text never has there. So
a text is cut
- at white space: before the space in front of a word, which most tokenizers put into the word's token, and after other
  white space;
- at the end of a special token;
- between two characters of which one belongs to a script without spaces (Chinese, Japanese, Thai and others), but never
  inside one visible character.
A text without any such place, such as "2+2=4", is cut after a character that ends a label or one side of an equation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from alignlab.data.bad_row import BadRow
from alignlab.types import Text

_ENDS_A_LABEL = ":=>]"
_JOINER = "\u200d"
_MARKS = "\u0e33\u0eb3\uff9e\uff9f"  # vowels of Thai and Lao, and narrow Japanese marks: Unicode calls them letters
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1980-\u19df\u1a20-\u1aaf\u2e80-\u312f\u3190-\u4dbf\u4e00-\ua4cf"
    "\uaa00-\uaa7f\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)


def common_prompt(chosen: Text, rejected: Text, special_tokens: Iterable[str] = ()) -> tuple[Text, Text, Text]:
    """Cut two conversations or texts that begin alike into (prompt, chosen, rejected).

    Args:
        special_tokens: texts of the tokenizer's special tokens.

    Raises:
        BadRow: the two do not begin alike, or nothing follows the common beginning in one of them.
    """
    differences = (i for i, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1])
    shortest = min(len(chosen), len(rejected))
    shared = next(differences, shortest)
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared, is_empty = _shared_text(chosen, rejected, shared, special_tokens)
    else:
        is_empty = shared == shortest
    if is_empty:
        raise BadRow("empty", "has nothing in 'chosen' or 'rejected' after what the two have in common")
    if shared == 0:
        raise BadRow(
            "other_prompt",
            "has no column of prompts, and 'chosen' and 'rejected' do not begin alike for a whole word; give a prompt",
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared_text(chosen: str, rejected: str, shared: int, special_tokens: Iterable[str]) -> tuple[int, bool]:
    """Return the length of the prompt of two texts, and True if nothing follows it in one of them.

    Args:
        shared: number of equal characters at the beginning.
    """
    shortest = min(len(chosen), len(rejected))
    may_be_in_a_word = shared < shortest or chosen[:shared][-1:].isalnum()  # "Yes" and "Yesterday"
    cut = place_to_cut(chosen, rejected, shared, special_tokens) if may_be_in_a_word else shared
    is_blank = not (chosen[cut:].strip() and rejected[cut:].strip())
    return cut, is_blank or (cut == 0 and shared == shortest)


def place_to_cut(chosen: str, rejected: str, shared: int, special_tokens: Iterable[str]) -> int:
    """Return the last position, at most `shared`, where both texts can be cut; 0 if there is none."""
    specials = tuple(special_tokens)
    for position in range(shared, 0, -1):
        ends_special = bool(specials) and chosen.endswith(specials, 0, position)
        if ends_special or (_can_be_cut(chosen, position) and _can_be_cut(rejected, position)):
            has_space = not ends_special and chosen[position - 1] == " "
            return position - 1 if has_space and position > 1 else position
    label_ends = (i for i in range(shared, 0, -1) if chosen[i - 1] in _ENDS_A_LABEL)
    return next(label_ends, 0)


def _can_be_cut(text: str, position: int) -> bool:
    if position == len(text):
        return True
    before, after = text[position - 1], text[position]
    if _is_one_character(before, after):
        return False
    return before.isspace() or after.isspace() or _needs_no_spaces(before) or _needs_no_spaces(after)


def _is_one_character(before: str, after: str) -> bool:
    """Return True if two code points belong to one visible character."""
    if before + after == "\r\n" or before == _JOINER or after in _JOINER + _MARKS:
        return True
    return unicodedata.category(after).startswith("M") or _SKIN_TONES.match(after) is not None


def _needs_no_spaces(character: str) -> bool:
    """Return True for characters of a script without spaces, but not for its digits and for wide Latin letters."""
    kind = unicodedata.category(character)
    return not kind.startswith("N") and kind not in ("Lu", "Ll") and _WITHOUT_SPACES.match(character) is not None
