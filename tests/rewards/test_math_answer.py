import logging
import math
import random
import threading
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from alignlab_rewards.answers import columns
from alignlab_rewards.math_answer import math_answer

# Answers as datasets write them. Each is right where it is repeated: alone, in a box, in a sentence.
_ANSWERS = (
    r"B|(C)|No|no|Yes|AB|pi/4|2*pi|2 1/2|€5|£5|x**2+1|10 m/s|5 km/h|sin(x)|sqrt(2)|log(2)|1e-3|3/4|-5|−5|x"
    r"+1|x = 5|(1, 2)|{1, 2}|[1, 2)|1, 2|2 and 3|12:30|50%|$5|5 cm|5 cm^2|1,234|1234567|0.5|.5|a/b|n!|5!|2"
    r"^10|2^1000|e^x|e^{-x^2}|i|1 + 2i|infinity|oo|none|undefined|DNE|even|east|July 4|1776|3rd|IV|f(x) = "
    r"x^2|y = 2x + 1|A, C|√2|π|90°|3:4|H2O|x < 3|x ≤ 3|1 : 2|100 g|2 hours|two|36 cm|30 degrees|\frac12|\s"
    r"qrt{2}|\pi|\infty|\text{yes}|\{1,2\}|\left(1, 2\right)|10^{10^{10}}|\int_0^1 x dx|Mr. Smith|New York"
    r" City|3 red, 2 blue|don't know|a_1|\vec{v}|x \in \mathbb{Z}|\sum_{k=1}^n k|1/3 or 2/3|-\infty|c d|O("
    r"n log n)"
)
ANSWERS = _ANSWERS.split("|")


@pytest.mark.parametrize(
    "form", ["{}", r"\boxed{{{}}}", "The answer is {}.", "**Answer:** {}", "<think>?</think>\n\n{}"]
)
def test_an_answer_repeated_word_for_word_is_right(form: str) -> None:
    texts = [form.format(answer) for answer in ANSWERS]
    values = math_answer(completions=texts, answer=list(ANSWERS))
    assert [text for text, value in zip(texts, values, strict=True) if value != 1.0] == []


def test_no_answer_equals_another_one() -> None:
    different = [
        "B", "No", "pi/4", "x**2+1", "10 m/s", "sqrt(2)", "3/4", "x = 5", "(1, 2)", "[1, 2)", "50%", "DNE", "H2O",
        "x < 3",
    ]  # fmt: skip
    for answer in different:
        values = math_answer(completions=[rf"\boxed{{{answer}}}"] * len(different), answer=different)
        assert values == [float(gold == answer) for gold in different], answer


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        (72, "72"),
        (72.0, "72"),
        (np.int64(72), "72"),
        (np.float64(72.0), "72"),
        (np.float32(0.5), "1/2"),
        (Decimal("72.50"), "72.5"),
        (Fraction(1, 3), "1/3"),
        (1 / 3, r"\frac{1}{3}"),
        (0.1 + 0.2, "0.3"),
        (True, "True"),
        (np.bool_(False), r"\boxed{false}"),
        (["72"], "72"),
        ([1, 2], "2, 1"),
        (np.array([1, 2]), r"\{1, 2\}"),
        (("a", "b"), "b and a"),
        ({"ground_truth": "72"}, "72"),
        ({"ground_truth": [72.0]}, "72"),
        (10**30, str(10**30)),
        (float("inf"), r"\infty"),
        ("6*7 = <<6*7=42>>42.\n#### 42", "42"),
        (r"Since $6 \cdot 7 = 42$, it is \boxed{42}.", "42"),
        ("The answer is 42.", "42"),
    ],
)
def test_expected_answers_of_any_type_are_compared_by_value(gold: Any, text: str) -> None:
    assert math_answer(completions=[text, "It is 41."], answer=[gold, gold]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "gold", [None, math.nan, np.float64("nan"), Decimal("nan"), "", "  ", [], "nan", {"ground_truth": None}]
)
def test_a_missing_answer_gives_no_value(gold: Any) -> None:
    assert math_answer(completions=["72"], answer=[gold]) == [None]


def test_missing_answers_are_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_LOGGED_GAPS", set())
    caplog.set_level(logging.INFO)
    for _ in range(3):
        math_answer(completions=["1", "1", "1"], answer=[math.nan, None, "1"])
    assert [(record.levelname, record.getMessage().split(";")[0]) for record in caplog.records] == [
        ("WARNING", "math_answer: a row's expected answer is NaN"),
        ("INFO", "math_answer: a row's expected answer is None"),
    ]


@pytest.mark.parametrize("gold", [{"value": "72"}, object(), b"72", ["72", None]])
def test_a_value_that_cannot_be_an_answer_is_refused(gold: Any) -> None:
    with pytest.raises(ValueError, match="math_answer needs"):
        math_answer(completions=["72"], answer=[gold])


def test_the_column_solution_and_chat_messages_are_read() -> None:
    assert math_answer(completions=["1", "2"], solution=[r"Thus \boxed{1}", "1"]) == [1.0, 0.0]
    assert math_answer(completions=[[{"role": "assistant", "content": "1"}]], answer=["1"]) == [1.0]
    with pytest.raises(ValueError, match="'answer' or 'solution'"):
        math_answer(completions=["1"])


def test_the_option_thinking_selects_the_part_that_counts() -> None:
    texts = ["It is 5.</think>It is 12.", "It is 12.", "<think>It is 12.", r"\boxed{12}</think>"]
    assert math_answer(completions=texts, answer=["12"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert math_answer(completions=texts, answer=["12"] * 4, thinking="required") == [1.0, 0.0, 0.0, 0.0]
    assert math_answer(completions=texts, answer=["12"] * 4, thinking="keep") == [1.0, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="auto, required or keep"):
        math_answer(completions=texts, answer=["12"] * 4, thinking="after")


def test_numbers_are_exact_unless_a_tolerance_is_given() -> None:
    texts = ["0.333", "0.3333", r"\boxed{0.34}", "-0.3333", "1.0"]
    assert math_answer(completions=texts, answer=["1/3"] * 5) == [0.0] * 5
    assert math_answer(completions=texts, answer=["1/3"] * 5, relative_tolerance=0.01) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert math_answer(completions=["3.14159", "3.2"], answer=[r"\pi"] * 2, relative_tolerance=1e-4) == [1.0, 0.0]
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        math_answer(completions=texts, answer=["1/3"] * 5, relative_tolerance=1.5)


def test_math_answer_works_in_threads_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    values: list[list[float | None]] = []
    golds = [r"\sqrt{8}", r"\mathbb{R} \setminus \{1, 2\}", r"\vec{a} + \vec{b}", "sin(2x)"]
    texts = [r"\boxed{2\sqrt2}", r"\boxed{x \ne 1}", r"\boxed{\vec{b} + \vec{a}}", r"\boxed{2\sin x\cos x}"]
    threads = [
        threading.Thread(target=lambda: values.append(math_answer(completions=texts, answer=golds))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == [[1.0, 0.0, 1.0, 1.0]] * 4
    assert not caplog.records


HOSTILE = {
    "towers": [r"\boxed{10^{10^{10}}}", "12 ** 9999999999", "$9^{9^{9^9}}$", "2^3^4^5", r"\boxed{e^{e^{e^{e^e}}}}"],
    "factorials": [
        "99999!",
        "(100!)!",
        r"\boxed{3000!!!}",
        r"\boxed{\binom{10^9}{5\cdot10^8}}",
        r"\boxed{" + "+".join(["2999!"] * 120) + "}",
    ],
    "digits": [
        "9" * 100_000,
        r"\boxed{" + "7" * 3900 + "}",
        "1e99999999",
        r"\boxed{1e3999 \cdot 1e3999}",
        "９" * 100_000,
    ],
    "boxes": [
        r"\boxed{1}" * 20_000,
        r"\boxed{" * 20_000,
        r"\boxed{}" * 20_000,
        r"\boxed{" + r"\text{" * 300 + "}" * 301,
    ],
    "depth": [
        "(" * 100_000,
        r"\boxed{" + r"\frac{1}{1+" * 200 + "1" + "}" * 201,
        r"\boxed{" + "-" * 1900 + "1}",
        r"\boxed{" + r"\{1," * 400 + "}",
    ],
    "length": [
        piece * (100_000 // len(piece))
        for piece in ("a", " ", "\n", "*", "$", "\\", ".", "the answer is ", "12 ", "1,234,", "#### 1\n", "`", "_", "=")
    ],
    "calculus": [
        r"\boxed{\sum_{k=1}^{10^9} k}",
        r"\boxed{\prod_{k=1}^{10^9} k}",
        r"\boxed{\int_0^\infty \frac{\sin x^2}{1+x^7} dx}",
        r"\boxed{\lim_{x\to0} \frac{\sin\sin x}{x}}",
    ],
    "functions": [
        r"\boxed{\sin(10^{10^6})}",
        r"\boxed{\exp(10^{20})}",
        r"\boxed{(x+y+z)^{5000000}}",
        r"\boxed{\sqrt[999999]{2}}",
        r"\boxed{" + "x!+" * 140 + "1}",
        r"\boxed{lcm(" + ", ".join(str(4 * i) for i in range(1, 21)) + ")}",
    ],
    "undefined": [
        r"\boxed{\frac{1}{0}}",
        r"\boxed{0^0}",
        r"\boxed{\infty - \infty}",
        r"\boxed{\log 0}",
        r"\boxed{((}",
        r"\boxed{\frac}",
    ],
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("gold", ["4", "Monday", r"\{x, 2\}"])
@pytest.mark.timeout(60)
def test_an_answer_that_cannot_be_computed_is_wrong_in_bounded_time(kind: str, gold: str) -> None:
    assert math_answer(completions=HOSTILE[kind], answer=[gold] * len(HOSTILE[kind])) == [0.0] * len(HOSTILE[kind])


_PIECES = (
    r"\frac{ \sqrt{ \sqrt[3]{ { } ( ) [ ] \{ \} \boxed{ $ $$ \[ \] ** * ^ _ ^{ _{ ! + - / = < \le \ne , ; "
    r": or and x y n 1 2 10 999 1,234 0.5 1e9 10^9 % \% $5 \pi pi e i \infty \cup \in \pm \sin \log_ \ln s"
    r"in( log( max( \binom{ \int_0^1 \sum_{k=1}^{n} \lim_{x\to0} \text{cm} \text{ ^\circ km/h apples #### "
    r"| B (A) Monday yes no ½ √ ² − × ≤ ° π \begin{pmatrix} \end{pmatrix} & \\ </think> <answer> \overline"
    r"{ \mathbb{R} \setminus \vec{ \cdot \times \left( \right) ` # \lfloor \rfloor 3:4 ' \alpha gcd( \mod "
    r"\cap f(x) x' \ !! ..."
)
PIECES = _PIECES.split()


@pytest.mark.timeout(120)
def test_random_pieces_of_latex_never_raise_and_always_end() -> None:
    random_ = random.Random(0)
    for _ in range(150):
        glue = random_.choice(["", " "])
        text = glue.join(random_.choices(PIECES, k=random_.choice([3, 8, 25, 60])))
        gold = random_.choice(
            ["4", "x^2+1", r"\{1,2\}", "x<3", "Monday", "B", "5 cm", "".join(random_.choices(PIECES, k=4))]
        )
        values = math_answer(completions=[text, rf"\boxed{{{text}}}"], answer=[gold, gold])
        assert set(values) <= {0.0, 1.0}


def test_rows_without_an_answer_are_judged_by_their_solution() -> None:
    answer, solution = ["1", None, float("nan"), None], [None, "2", "4", None]
    values = math_answer(completions=["1", "2", "3", "4"], answer=answer, solution=solution)
    assert values == [1.0, 1.0, 0.0, None]


@pytest.mark.parametrize(
    "gold",
    [10**5000, -(10**5000), Fraction(1, 10**5000), Decimal("1E5000"), Decimal("1E999999"), Decimal("1E-10000000")],
    ids=["int", "negative", "fraction", "decimal", "huge", "tiny"],
)
def test_an_expected_number_of_too_many_digits_is_refused_by_name(gold: Any) -> None:
    with pytest.raises(ValueError, match=r"expected numbers of at most 4000 digits.*write it as text"):
        math_answer(completions=["5"], answer=[gold])


def test_the_text_none_is_a_missing_answer() -> None:
    assert math_answer(completions=["5", "None"], answer=["None", "None"]) == [None, None]
