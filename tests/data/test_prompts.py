import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.data.prompts import column_names, load_prompts, prompts_from_rows
from alignlab.errors import ConfigError, DataError
from alignlab.types import Prompt

ROWS = [{"prompt": "What is 1 + 2", "answer": "3"}, {"prompt": "What is 2 + 2", "answer": "4"}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def rendered(dataset: Sequence[Prompt], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(prompt.token_ids) for prompt in dataset]


def test_plain_rows(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = DataSettings(prompt_template="Q: {prompt} {x}\nA:")
    dataset = prompts_from_rows(ROWS, settings, plain_tokenizer)
    assert rendered(dataset, plain_tokenizer) == [f"Q: {row['prompt']} {{x}}\nA:" for row in ROWS]
    assert [prompt.text for prompt in dataset] == [row["prompt"] for row in ROWS]
    assert [dict(prompt.columns) for prompt in dataset] == [{"answer": "3"}, {"answer": "4"}]
    assert [prompt.index for prompt in dataset] == [0, 1]
    assert column_names(dataset) == ("answer",) and not dataset.skipped


def test_plain_prompts_become_a_users_message(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = DataSettings(system_prompt="Be brief.", prompt_template="{prompt}?")
    (text, _) = rendered(prompts_from_rows(ROWS, settings, chat_tokenizer), chat_tokenizer)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_can_be_turned_off(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = prompts_from_rows(ROWS, DataSettings(chat=False), chat_tokenizer)
    assert rendered(dataset, chat_tokenizer) == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_messages_as_prompt(chat_tokenizer: PreTrainedTokenizerFast, column: str) -> None:
    user = [{"role": "user", "content": "hi", "name": None}]
    (prompt,) = prompts_from_rows([{column: user, "n": 1}], DataSettings(), chat_tokenizer)
    assert chat_tokenizer.decode(prompt.token_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.text == [{"role": "user", "content": "hi"}]
    assert dict(prompt.columns) == {"n": 1}


def test_the_last_assistant_message_of_messages_is_the_answer(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT, "answer": "own"}]
    first, second = prompts_from_rows(rows, DataSettings(), chat_tokenizer)
    assert first.text == second.text == CHAT[:1]
    assert first.token_ids == second.token_ids
    assert (first.columns["answer"], second.columns["answer"]) == ("yo", "own")


def test_a_prompt_that_ends_with_the_assistant_is_continued(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    (prompt,) = prompts_from_rows([{"prompt": CHAT}], DataSettings(), chat_tokenizer)
    assert chat_tokenizer.decode(prompt.token_ids).endswith("<|im_start|>assistant\nyo")


def test_a_rows_own_system_message_stays(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    (prompt,) = prompts_from_rows([{"prompt": messages}], DataSettings(system_prompt="other"), chat_tokenizer)
    text = chat_tokenizer.decode(prompt.token_ids)
    assert text.startswith("<|im_start|>system\nown") and "other" not in text


@pytest.mark.parametrize(
    ("chat", "text", "expected"),
    [(True, "hi", "<bos>[user]hi[assistant]"), (False, "hi", "<bos>hi"), (False, "<bos>hi", "<bos>hi")],
)
def test_one_bos_and_no_eos(framing_tokenizer: PreTrainedTokenizerFast, chat: bool, text: str, expected: str) -> None:
    (prompt,) = prompts_from_rows([{"prompt": text}], DataSettings(chat=chat), framing_tokenizer)
    assert framing_tokenizer.decode(prompt.token_ids) == expected
    assert prompt.token_ids.count(framing_tokenizer.bos_token_id) == 1


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"question": "hi"}, "missing_column", "no column 'prompt'.*question"),
    ({"prompt": None}, "missing_column", "nothing in the column 'prompt'"),
    ({"prompt": 7}, "wrong_type", "has int in the column 'prompt'"),
    ({"prompt": [{"content": "hi"}]}, "wrong_type", "dict of role and content"),
    ({"prompt": [{"role": "user"}]}, "wrong_type", "dict of role and content"),
    ({"messages": "hi"}, "wrong_type", "a string in the column 'messages'"),
    ({"prompt": " "}, "empty", "empty string"),
    ({"prompt": []}, "empty", "empty list"),
    ({"messages": CHAT[1:]}, "empty", "only the assistant's message"),
    ({"prompt": "1 " * 40}, "too_long", "max_prompt_tokens is 60"),
]


@pytest.mark.parametrize(("row", "reason", "named"), BAD)
def test_bad_rows_stop_with_their_number_or_are_counted(
    chat_tokenizer: PreTrainedTokenizerFast,
    row: dict[str, Any],
    reason: str,
    named: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [{"prompt": "a"}, row, {"prompt": "b"}]
    with pytest.raises(DataError, match=f"row 1 .*{named}"):
        prompts_from_rows(rows, DataSettings(max_prompt_tokens=60), chat_tokenizer)
    with caplog.at_level(logging.WARNING):
        dataset = prompts_from_rows(rows, DataSettings(max_prompt_tokens=60, on_bad_row="skip"), chat_tokenizer)
    assert dataset.skipped == {reason: 1}
    assert [(prompt.index, prompt.text) for prompt in dataset] == [(0, "a"), (2, "b")]
    assert f"skipped 1 rows ({reason} 1)" in caplog.text


def test_a_prompt_at_the_limit_is_kept(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = DataSettings(max_prompt_tokens=4, on_bad_row="skip")
    dataset = prompts_from_rows([{"prompt": "1234"}, {"prompt": "12345"}], settings, plain_tokenizer)
    assert [prompt.text for prompt in dataset] == ["1234"]


def test_a_dataset_of_too_long_rows_alone_names_the_limit(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = RenderSettings(max_prompt_tokens=4, on_bad_row="skip")
    with pytest.raises(DataError, match=r"too_long 2\).*raise RenderSettings\.max_prompt_tokens, which is 4"):
        prompts_from_rows([{"prompt": "12345"}] * 2, settings, plain_tokenizer)


@pytest.mark.parametrize("rows", [[], [{"prompt": ""}]])
def test_an_empty_dataset_is_an_error(plain_tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="at least one usable row"):
        prompts_from_rows(rows, DataSettings(on_bad_row="skip"), plain_tokenizer)


@pytest.mark.parametrize(
    ("settings", "row", "named"),
    [
        (DataSettings(chat=True), ROWS[0], "no chat template"),
        (DataSettings(system_prompt="x"), ROWS[0], "data.prompt_template instead"),
        (DataSettings(), {"prompt": CHAT[:1]}, "prompts are plain here"),
    ],
)
def test_chat_settings_need_a_template(
    plain_tokenizer: PreTrainedTokenizerFast, settings: DataSettings, row: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        prompts_from_rows([row], settings, plain_tokenizer)


def test_a_template_around_messages_is_refused(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="list of messages; remove it"):
        prompts_from_rows([{"prompt": CHAT[:1]}], DataSettings(prompt_template="{prompt}!"), chat_tokenizer)


def test_a_dataset_object_and_a_generator(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    expected = prompts_from_rows(ROWS, DataSettings(), plain_tokenizer)
    assert prompts_from_rows(Dataset.from_list(ROWS), DataSettings(), plain_tokenizer) == expected
    assert prompts_from_rows((row for row in ROWS), DataSettings(), plain_tokenizer) == expected
    assert prompts_from_rows(ROWS, DataSettings(size=1), plain_tokenizer) == expected[:1]


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif suffix == ".csv":
        path.write_text("prompt,answer\n" + "".join(f'"{row["prompt"]}",{row["answer"]}\n' for row in ROWS))
    else:
        Dataset.from_list(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_local_files(plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str) -> None:
    dataset = load_prompts(DataSettings(path=str(write(tmp_path, suffix))), plain_tokenizer)
    assert dataset == prompts_from_rows(ROWS, DataSettings(), plain_tokenizer)


def test_a_folder_that_datasets_wrote(plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    dataset = load_prompts(DataSettings(path=str(tmp_path / "saved")), plain_tokenizer)
    assert dataset == prompts_from_rows(ROWS, DataSettings(), plain_tokenizer)
    with pytest.raises(ConfigError, match="a folder of one split's rows"):
        load_prompts(DataSettings(path=str(tmp_path / "saved"), split="test"), plain_tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2"),
        ("a.jsonl", '{"prompt": "a"}\n[1]\n', "line 2 must be a JSON object"),
        ("a.json", '{"prompt": "a"}', "JSON list of objects"),
        ("a.parquet", "no parquet", "must be a Parquet file"),
        (None, "", "existing file"),
    ],
)
def test_files_that_cannot_be_read(
    plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str | None, content: str, named: str
) -> None:
    if name is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=named):
        load_prompts(DataSettings(path=str(tmp_path / (name or "none.jsonl"))), plain_tokenizer)


def test_a_dataset_that_cannot_be_fetched_names_the_hub(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        load_prompts(DataSettings(path="nobody/no-such-dataset"), plain_tokenizer)


def test_a_task(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    train, held_out = (
        load_prompts(DataSettings(task="chain_sum", split=split, size=5), plain_tokenizer)
        for split in ("train", "eval")
    )
    assert len(train) == len(held_out) == 5
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}
    assert column_names(train) == ("answer", "task", "task_options", "metadata")


def test_no_source_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="exactly one of path and task"):
        load_prompts(DataSettings(), plain_tokenizer)


def test_a_csv_row_with_a_surplus_field_is_an_error_with_its_line(
    plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,answer\none,1\nWhat is 2,3 rounded?,2\n")
    with pytest.raises(DataError, match=r"row 1 .* has more fields than the header names; put fields that hold commas"):
        load_prompts(DataSettings(path=str(path)), plain_tokenizer)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_a_byte_order_mark_is_skipped(
    suffix: str, plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    texts = {"csv": "prompt\none\n", "jsonl": '{"prompt": "one"}\n', "json": '[{"prompt": "one"}]'}
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + texts[suffix].encode())
    assert [p.text for p in load_prompts(DataSettings(path=str(path)), plain_tokenizer)] == ["one"]
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="must be text in UTF-8"):
        load_prompts(DataSettings(path=str(path)), plain_tokenizer)


def test_a_message_without_content_is_a_bad_row(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]}, {"prompt": "ok"}]
    settings = RenderSettings(on_bad_row="skip")
    assert prompts_from_rows(rows, settings, chat_tokenizer).skipped == {"wrong_type": 1}


def test_rows_without_the_needed_columns_are_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    wrong: Any = ["one", "two"]
    with pytest.raises(DataError, match=r"row 0 .* is str, and must be a dict"):
        prompts_from_rows(wrong, RenderSettings(), plain_tokenizer)
    splits: Any = {"train": [], "test": []}
    with pytest.raises(DataError, match="must be rows, and is a mapping of train, test"):
        prompts_from_rows(splits, RenderSettings(), plain_tokenizer)


def test_a_split_of_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval_frac is 0\.5, and must stay 0\.2 without task"):
        DataSettings(path="rows.jsonl", eval_frac=0.5)
