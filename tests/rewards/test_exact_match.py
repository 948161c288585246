from alignlab_rewards.exact_match import exact_match


def test_only_the_answer_itself_counts() -> None:
    completions = ["4", " 4\n", "4.", "It is 4", "-4"]
    assert exact_match(completions=completions, answer=["4"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_case_and_numbers_and_chat() -> None:
    chat = [{"role": "assistant", "content": "YES"}]
    assert exact_match(completions=[chat, chat], answer=["yes", None]) == [0.0, None]
    assert exact_match(completions=[chat], answer=["yes"], ignore_case=True) == [1.0]
    assert exact_match(completions=["7"], answer=[7]) == [1.0]
