import threading

import pytest
from alignlab_rewards.math_answer import math_answer


@pytest.mark.parametrize(
    ("answer", "completion", "value"),
    [
        ("3/4", r"So we get $\boxed{0.75}$.", 1.0),
        (r"\frac{3}{4}", "The answer is 3/4.", 1.0),
        (r"$\frac{3}{4}$", r"$\frac{6}{8}$", 1.0),
        ("-4", "= -4.", 1.0),
        ("-4", "= 4", 0.0),
        ("1,000", "1000", 1.0),
        ("x^2 + 1", r"$1 + x^2$", 1.0),
        ("5", "no idea", 0.0),
        ("5", "", 0.0),
        ("5", r"$\frac{1}{0}$ \boxed{((}", 0.0),
        (7, "7", 1.0),
        ("3 apples", "so 3", 1.0),
        ("(1, 2)", "$(1, 2)$", 1.0),
        (r"\sqrt{2}", r"$\sqrt 2$", 1.0),
    ],
)
def test_equal_in_value(answer: object, completion: str, value: float) -> None:
    assert math_answer(completions=[completion], answer=[answer]) == [value]


def test_does_not_apply_without_a_readable_answer() -> None:
    chat = [{"role": "assistant", "content": "1"}]
    assert math_answer(completions=[chat, chat, chat], answer=["1", None, ""]) == [1.0, None, None]


def test_trls_column() -> None:
    assert math_answer(completions=["1", "2"], solution=[r"Thus \boxed{1}", "1"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="'answer' or 'solution'"):
        math_answer(completions=["1"])


def test_works_in_a_thread_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    values: list[float | None] = []
    thread = threading.Thread(target=lambda: values.extend(math_answer(completions=["1/2"], answer=["0.5"])))
    thread.start()
    thread.join()
    assert values == [1.0]
    assert not caplog.records


@pytest.mark.parametrize(
    "completion", [r"\boxed{10^{10^{10}}}", "12 ** 9999999999", "$9^{9^{9^9}}$", "2^3^4", "99999!", "(100!)!"]
)
def test_what_would_be_computed_for_ever_is_wrong_at_once(completion):
    assert math_answer(completions=[completion], answer=["4"]) == [0.0]


@pytest.mark.parametrize(
    "answer",
    [r"\$18.90", r"\text{Evelyn}", "even", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\text{June 20}", "x^{2}y^{3}"],
)
def test_an_answer_equals_itself_in_a_box(answer):
    assert math_answer(completions=[rf"So it is $\boxed{{{answer}}}$."], answer=[answer]) == [1.0]


def test_words_are_compared_as_words():
    assert math_answer(completions=["odd", r"\boxed{\text{Even}}", "even."], answer=["even"] * 3) == [0.0, 1.0, 1.0]
