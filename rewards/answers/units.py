"""Units of measure: the text beside a number, read as dimensions and a factor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PREFIXES = {"k": 3, "c": -2, "m": -3, "d": -1}
_LONG_PREFIXES = {"kilo": 3, "centi": -2, "milli": -3, "deci": -1}

# Dimension, then each name with its factor. A name of one dimension is never one of another.
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "m meter meters metre metres": "1", "in inch inches": "0.0254", "ft foot feet": "0.3048",
        "yd yard yards": "0.9144", "mi mile miles": "1609.344",
    },
    "time": {
        "s sec secs second seconds": "1", "min mins minute minutes": "60", "h hr hrs hour hours": "3600",
        "day days": "86400", "week weeks": "604800",
    },
    "month": {"month months": "1", "yr yrs year years": "12"},
    "mass": {
        "g gram grams": "1", "lb lbs": "453.59237", "oz ounce ounces": "28.349523125",
        "t ton tons tonne tonnes": "1000000",
    },
    "volume": {"l L liter liters litre litres": "1"},
    "angle": {"deg degree degrees \\circ": "1", "rad radian radians": "57.29577951308232"},
    "celsius": {"\\circC": "1"}, "fahrenheit": {"\\circF": "1"}, "kelvin": {"K kelvin": "1"},
    "dollar": {"usd dollar dollars": "1", "cent cents": "0.01"}, "euro": {"eur euro euros": "1"},
    "sterling": {"gbp": "1", "pence": "0.01"}, "yen": {"jpy yen": "1"}, "rupee": {"inr rupee rupees": "1"},
    "force": {"N newton newtons": "1"}, "energy": {"J joule joules": "1", "cal calorie calories": "4.184"},
    "power": {"W watt watts": "1"}, "pressure": {"Pa pascal pascals": "1"}, "frequency": {"Hz hertz": "1"},
    "charge": {"C coulomb coulombs": "1"}, "current": {"A amp amps ampere amperes": "1"},
    "voltage": {"V volt volts": "1"}, "resistance": {"\\Omega ohm ohms": "1"}, "amount": {"mol mole moles": "1"},
}  # fmt: skip
_PREFIXED = ["m", "s", "g", "l", "L", "N", "J", "W", "Pa", "Hz", "V", "A", "mol", "cal"]
_LONG_PREFIXED = ["meter", "meters", "metre", "metres", "gram", "grams", "liter", "liters", "litre", "litres"]
CURRENCIES = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Words that no unit contains: they belong to another part of the sentence.
_NOT_A_UNIT = _word_set(
    "of them from out the is are was were and or but not so if then because since with who which that when "
    "where as at on for i we you it they to think too also well have has had he she our answer final "
    "therefore thus hence instead either neither nor both wait no yes actually than by be if maybe perhaps "
    "versus vs until"
)
_MONTHS = _word_set(
    "january february march april may june july august september october november december monday tuesday "
    "wednesday thursday friday saturday sunday"
)
_FACTOR = re.compile(r"(\\circ\s?[CF](?![A-Za-z])|\\[A-Za-z]+|[A-Za-z]+)\s*(?:\^\s*(?:\{\s*(-?\d)\s*\}|(-?\d)))?")
_FRACTION = re.compile(r"^\\frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}$")
_SPEED = re.compile(r"\b(?:(mph)|k(?:ph|mh|mph))\b", re.IGNORECASE)
_SQUARED = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_JOINER = re.compile(r"\s*(?:(/|\bper\b)|[*.·]|\\cdot|-)?\s*")


@dataclass(frozen=True)
class Unit:
    """A unit of measure, or words that only say what was counted.

    Attributes:
        dimensions: sorted pairs of a dimension and its power; empty where the words are no known unit.
        factor: the number of base units in it.
        counted: the words say what was counted, such as "apples".
    """

    dimensions: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)
    counted: bool = False

    @property
    def known(self) -> bool:
        """True for a unit of measure, False for other words."""
        return bool(self.dimensions)

    @property
    def measures_angles(self) -> bool:
        """True for degrees and radians, which may belong to a function's argument: `sin 30°`."""
        return self.dimensions == (("angle", 1),)


def _names() -> dict[str, tuple[str, Fraction]]:
    """Return the dimension and the factor of every name, with its prefixes."""
    names = {
        name: (dimension, Fraction(factor))
        for dimension, entries in _TABLE.items()
        for spellings, factor in entries.items()
        for name in spellings.split()
    }
    prefixed = {
        prefix + name: (names[name][0], names[name][1] * Fraction(10) ** power)
        for stems, prefixes in ((_PREFIXED, _PREFIXES), (_LONG_PREFIXED, _LONG_PREFIXES))
        for name in stems
        for prefix, power in prefixes.items()
    }
    return prefixed | names


_NAMES = _names()


def read_unit(text: str) -> Unit | None:
    """Return the unit that a text is, such as `km/h`, `square meters` or `apples`; None where it is no unit.

    Words that are no unit of measure name what was counted; up to four are allowed, none of which may be a word that
    joins parts of a sentence or a month's name.
    """
    text = _FRACTION.sub(r"\1/\2", text.strip(" ."))
    text = _SPEED.sub(lambda match: "mile/hour" if match[1] else "km/hour", text)
    if not text:
        return Unit()
    return (_measure(text) or _counted(text)) if len(text) <= 60 else None


def _counted(text: str) -> Unit | None:
    words = re.findall(r"[A-Za-z'’-]+", text)
    if re.search(r"[^A-Za-z'’\s-]", text) or not 1 <= len(words) <= 4 or (len(words) == 1 and len(words[0]) < 2):
        return None
    if {word.casefold() for word in words} & (_NOT_A_UNIT | _MONTHS):
        return None
    # "5 feet tall" is a length, and "5 red apples" a number of something.
    return _measure(words[0]) or Unit(counted=True)


def read_scale(word: str) -> int | None:
    """Return the number that a word such as `million` multiplies by; None for other words."""
    return _SCALES.get(word.casefold().removesuffix("s"))


def _measure(text: str) -> Unit | None:
    """Return a product of units of measure, such as `km/h`; None where a part is no such unit."""
    powers: dict[str, int] = {}
    factor = Fraction(1)
    for name, power in _factors(text):
        entry = _NAMES.get(name) or _NAMES.get(name.casefold())
        if entry is None:
            return None
        powers[entry[0]] = powers.get(entry[0], 0) + power
        factor *= entry[1] ** power
    dimensions = tuple(sorted((dimension, power) for dimension, power in powers.items() if power))
    return Unit(dimensions, factor) if dimensions else None


def _factors(text: str) -> list[tuple[str, int]]:
    """Return each name with its power: `square feet per second` is ft^2 s^-1; "?" is a sign that no unit has."""
    factors: list[tuple[str, int]] = []
    position, sign, power_in_front = 0, 1, 1
    while position < len(text):
        joiner = _JOINER.match(text, position)
        if joiner is not None and joiner.end() > position:
            sign = -1 if joiner[1] else sign  # every unit behind a "/" or "per" divides
            position = joiner.end()
            continue
        match = _FACTOR.match(text, position)
        if match is None:
            return [*factors, ("?", 1)]
        position, name = match.end(), match[1].replace(" ", "")
        if name not in _SQUARED:
            factors.append((name, sign * power_in_front * _exponent(match)))
            power_in_front = 1
        elif name.endswith("ed") and factors:
            factors[-1] = (factors[-1][0], factors[-1][1] * _SQUARED[name])
        else:
            power_in_front = _SQUARED[name]
    return factors


def _exponent(match: re.Match[str]) -> int:
    return int(match[2] or match[3] or 1)
