from alignlab_rewards.regex_format import regex_format


def test_the_whole_completion_must_match() -> None:
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    right = "<think>a\nb</think>\n<answer>4</answer>"
    completions = [right, f" {right}\n", right + ".", "x" + right, "4"]
    assert regex_format(completions=completions, pattern=pattern) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_regex_format_reads_chat_messages() -> None:
    assert regex_format(completions=[[{"role": "assistant", "content": "42"}]], pattern=r"\d+") == [1.0]
