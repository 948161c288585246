"""The prompt of a pair that has no column for it: what `chosen` and `rejected` have in common at their beginning.

A model that goes on from the middle of a word has tokens to write that no natural text has there. So a text is cut
- where white space is: before the space in front of a word, which most tokenizers put into the word's token, and after
  other white space;
- where a special token ends;
- between two characters of which one belongs to a script that needs no spaces: Chinese, Japanese, Thai and others, and
  never inside one visible character.
A text without any such place, as "2+2=4", is cut after a sign that ends a label or an equation's side.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from alignlab.data.messages import BadRow
from alignlab.types import Text

_ENDS_A_LABEL = ":=>]"
_JOINER = "\u200d"
_MARKS = "\u0e33\u0eb3\uff9e\uff9f"  # vowels of Thai and Lao, and narrow Japanese marks, that are letters to Unicode
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
        BadRow: they do not begin alike, or one of them has nothing of its own.
    """
    differ = (i for i, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    shortest = min(len(chosen), len(rejected))
    shared = next(differ, shortest)
    if isinstance(chosen, str) and isinstance(rejected, str):
        in_a_word = shared < shortest or chosen[:shared][-1:].isalnum()  # "Yes" and "Yesterday"
        shared = place_to_cut(chosen, rejected, shared, special_tokens) if in_a_word else shared
        blank = not (chosen[shared:].strip() and rejected[shared:].strip())
        nothing = blank or (shared == 0 and chosen[:shortest] == rejected[:shortest])
    else:
        nothing = shared == shortest
    if nothing:
        raise BadRow("empty", "has nothing in 'chosen' or 'rejected' after what the two have in common")
    if shared == 0:
        raise BadRow(
            "other_prompt",
            "has no column of prompts, and 'chosen' and 'rejected' do not begin alike for a whole word; give a prompt",
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def place_to_cut(chosen: str, rejected: str, shared: int, special_tokens: Iterable[str]) -> int:
    """Return the last place, at most `shared`, where both texts can be cut; 0 where there is none."""
    specials = tuple(special_tokens)
    for place in range(shared, 0, -1):
        ends_special = bool(specials) and chosen.endswith(specials, 0, place)
        if ends_special or (_can_be_cut(chosen, place) and _can_be_cut(rejected, place)):
            has_space = not ends_special and chosen[place - 1] == " "
            return place - 1 if has_space and place > 1 else place
    label_ends = (i for i in range(shared, 0, -1) if chosen[i - 1] in _ENDS_A_LABEL)
    return next(label_ends, 0)


def _can_be_cut(text: str, place: int) -> bool:
    if place == len(text):
        return True
    left, right = text[place - 1], text[place]
    if _is_one_character(left, right):
        return False
    return left.isspace() or right.isspace() or _needs_no_spaces(left) or _needs_no_spaces(right)


def _is_one_character(left: str, right: str) -> bool:
    """Tell whether the right code point belongs to the visible character of the left one."""
    if left + right == "\r\n" or left == _JOINER or right in _JOINER + _MARKS:
        return True
    return unicodedata.category(right).startswith("M") or _SKIN_TONES.match(right) is not None


def _needs_no_spaces(character: str) -> bool:
    """Tell whether a character is of a script without spaces; its digits, and wide Latin letters, are not."""
    kind = unicodedata.category(character)
    return not kind.startswith("N") and kind not in ("Lu", "Ll") and _WITHOUT_SPACES.match(character) is not None
