"""Files of rows: their kinds, and what is damaged in them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.data import arrow_limits, file_limits, files, packed_files
from alignlab.data.bad_row import BadRow
from alignlab.data.prompts import load_prompts, prompts_from_rows
from alignlab.data.rendering import PromptRenderer
from alignlab.data.sources import load_rows
from alignlab.errors import ConfigError, DataError


def texts(path: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> list[Any]:
    return [prompt.text for prompt in load_prompts(DataSettings(path=str(path), **settings), tokenizer)]


DAMAGED = [
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}\n', "row 1 .* line 2 must be .*, and is not JSON"),
    ("a.jsonl", b'{"prompt": "a"}\r\n\r\n7\r\n{"prompt": "c"}\r\n', "row 1 .* line 3 must be .*, and is int"),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n{"prompt": "c"}', "row 1 .* line 2 .* must be text in UTF-8"),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "prompt": "x"}\n{"prompt": "c"}', "line 2 .* key 'prompt' twice"),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b", "content": "x"}]}\n{"prompt": "c"}',
     "line 2 .* the key 'content' twice"),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ' + b"1" * 5000 + b'}\n{"prompt": "c"}', "line 2 .* not JSON"),
    ("a.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000 + b'\n{"prompt": "c"}', "line 2 .* nested too deeply"),
    ("a.json", b'[{"prompt": "a"}, 5, {"prompt": "c"}]', "row 1 .* is int, and must be a dict"),
    ("a.csv", b"prompt,answer\na,1\nb\nc,3\n", r"row 1 .* fewer fields than the header names.*line 3: 1, and not 2"),
    ("a.csv", b"prompt,answer\na,1\nb,2,3\nc,3\n", "row 1 .* more fields than the header names; put fields that hold"),
    ("a.csv", b'prompt,answer\na,1\n"b"x,2\nc,3\n', "row 1 .* is no row of CSV, up to line 3"),
]  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("text", [b"\0", b'{"prompt": "a"}\n'], ids=["one line", "many lines"])
def test_a_file_that_unpacks_to_far_more_than_its_size_is_refused(
    ending: str, text: bytes, tmp_path: Path, plain_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_limits, "ALWAYS_ALLOWED_BYTES", 2**16)
    path = tmp_path / f"a.{ending}.gz"
    path.write_bytes(gzip.compress(text * (2**20 // len(text))))
    with pytest.raises(DataError, match=r"a\.\w+\.gz must hold at most \d+ bytes of text, 100 times the size of"):
        texts(path, plain_tokenizer)


def test_a_packed_file_is_measured_before_its_first_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_limits, "ALWAYS_ALLOWED_BYTES", 2**16)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 2**16))
    with pytest.raises(DataError, match="must hold at most"):
        next(iter(files.file_rows(str(path))))


def test_a_file_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, plain_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_list([{"prompt": f"{i}" * 999} for i in range(999)]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' * 9999)
    assert len(texts(tmp_path / "a.jsonl", plain_tokenizer)) == 9999
    monkeypatch.setattr(file_limits, "ALWAYS_ALLOWED_BYTES", 1)
    monkeypatch.setattr(file_limits, "_MEMORY_FRACTION", 1e-12)
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(DataError, match=rf"{name} must .*half of the free memory"):
            texts(tmp_path / name, plain_tokenizer)


def test_a_table_with_a_long_repeated_text_is_refused(
    tmp_path: Path, plain_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = psutil.virtual_memory().available
    pd.DataFrame({"prompt": ["a" * 10**4] * 10**4, "n": range(10**4)}).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(file_limits, "_MEMORY_FRACTION", 5 * 10**7 / free)
    assert (tmp_path / "a.parquet").stat().st_size < 10**6
    with pytest.raises(DataError, match=r"a\.parquet must unpack to at most \d+ bytes, half of the free memory"):
        texts(tmp_path / "a.parquet", plain_tokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "%s"}\n\n{"prompt": "c"}\n' % (b"b" * 9999)),
        ("a.csv", b"prompt\na\n%s\nc\n" % (b"b" * 9999)),
    ],
)
def test_a_too_long_row_is_an_error_or_skipped(
    name: str, content: bytes, tmp_path: Path, plain_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_limits, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100)
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name, plain_tokenizer, on_bad_row="skip") == ["a", "c"]
    with pytest.raises(DataError, match=r"row 1 .*(line 2 must have at most 100 bytes|field larger than field limit)"):
        texts(tmp_path / name, plain_tokenizer)


@pytest.mark.parametrize("value", ["a" * 600, [{"role": "user", "content": "a" * 600}]])
def test_a_prompt_far_over_the_limit_is_refused_before_tokenisation(
    value: Any, plain_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RenderSettings(max_prompt_tokens=2, on_bad_row="skip")
    monkeypatch.setattr(PromptRenderer, "__call__", lambda *_: pytest.fail("it was rendered"))
    with pytest.raises(DataError, match=r"skipped: too_long 1"):
        prompts_from_rows([{"prompt": value}], settings, plain_tokenizer)
    with pytest.raises(DataError, match=r"has 6\d\d characters in 'prompt', and 2 tokens \(max_prompt_tokens\) have"):
        prompts_from_rows([{"prompt": value}], RenderSettings(max_prompt_tokens=2), plain_tokenizer)


@pytest.mark.parametrize("column", ["completion", "messages", "chosen"])
def test_a_text_longer_than_any_context_is_refused(column: str, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "a", column: [{"role": "user", "content": "a" * 2**22}]}
    with pytest.raises(BadRow, match=f"has 41943.. characters in '{column}', and a column of text has at most 4194304"):
        PromptRenderer(RenderSettings(), plain_tokenizer).read(row, 0)


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_a_damaged_row_is_an_error_with_its_number_or_skipped(
    name: str, content: bytes, message: str, plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(path, plain_tokenizer)
    assert texts(path, plain_tokenizer, on_bad_row="skip") == ["a", "c"]


REFUSED = [
    ("a.csv", b"prompt,answer,answer\nq,1,2\n", "the column 'answer' twice"),
    ("a.csv", b"prompt;answer\nq;1\n", "has semicolons: its only column is 'prompt;answer'; write it with commas"),
    ("a.csv", b"prompt\tanswer\nq\t1\n", "has tabs"),
    ("a.csv", "prompt\nq\n".encode("utf-16"), "is UTF-16 or UTF-32 by its first bytes"),
    ("a.csv", b"prompt\n\xff\n", "must be text in UTF-8"),
    ("a.csv", b"", "no rows at all"),
    ("a.csv", b"prompt,answer\n", "no rows at all"),
    ("a.csv", b'prompt,answer\n"a,1\n', "row 0 .* unexpected end of data"),
    ("a.jsonl", b"", "no rows at all"),
    ("a.jsonl", '{"prompt": "q"}'.encode("utf-16"), "is UTF-16"),
    ("a.json", b"", "not JSON"),
    ("a.json", b"[]", "no rows at all"),
    ("a.json", b'{"data": [{"prompt": "q"}]}', "is dict; write the list of 'data' alone"),
    ("a.json", b'{"prompt": "q"}\n{"prompt": "r"}\n', r"one object a line, call it \.jsonl"),
    ("a.json", b'[{"prompt": "q", "prompt": "r"}]', "has the key 'prompt' twice"),
    ("a.tsv", b"prompt\tanswer\nq\t1\n", r"is \.tsv; use \.jsonl, \.json, \.csv"),
    ("rows", b"prompt\nq\n", "is none by its name"),
    ("a.jsonl.gz", b"no gzip", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"prompt": "q"}\n', mtime=0)[:-9], "cannot be read"),
    ("a.parquet", b"", "must be a Parquet file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_a_file_that_cannot_be_read_says_why(
    name: str, content: bytes, message: str, plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(path, plain_tokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl.gz", b'{"prompt": "a"}\n'), ("a.json.GZ", b'[{"prompt": "a"}]'), ("a.csv.gz", b"prompt\na\n")],
)
def test_files_packed_with_gzip_are_read(
    name: str, content: bytes, plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert texts(tmp_path / name, plain_tokenizer) == ["a"]
    with pytest.raises(ConfigError, match="must stay train for a file"):
        DataSettings(path=str(tmp_path / name), split="test")


def test_an_empty_field_of_csv_is_a_missing_value(plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,answer\na,007\nb,\nc,""\n')
    prompts = load_prompts(DataSettings(path=str(path)), plain_tokenizer)
    assert [prompt.columns["answer"] for prompt in prompts] == ["007", None, None]


def test_nan_in_json_is_a_missing_value(plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": NaN}\n')
    assert load_prompts(DataSettings(path=str(path)), plain_tokenizer)[0].columns == {"answer": None}


def test_a_folder_of_parquet_files_is_read(
    plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    pd.DataFrame({"prompt": ["a", "b"]}).to_parquet(tmp_path / "rows" / "part.parquet")
    assert texts(tmp_path / "rows", plain_tokenizer) == ["a", "b"]


def packed(kind: str, content: bytes, path: Path) -> None:
    """Write a file of one member, packed in one of the ways that `datasets` unpacks."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("rows.jsonl", content)
    elif kind in ("zst", "lz4"):
        with pyarrow.output_stream(str(path), compression={"zst": "zstd"}.get(kind, kind)) as stream:
            stream.write(content)
    else:
        path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[kind].compress(content))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip", "zst", "lz4"])
def test_a_packed_file_in_a_folder_is_bounded_before_datasets_reads_it(
    kind: str, plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(file_limits, "ALWAYS_ALLOWED_BYTES", 2**16)
    monkeypatch.setattr(packed_files, "ALWAYS_ALLOWED_BYTES", 2**16)
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / ("rows.zip" if kind == "zip" else f"rows.jsonl.{kind}")
    packed(kind, b'{"prompt": "a"}\n' * 3, path)
    packed_files.check_file(str(path))
    if kind in ("gz", "bz2", "zip"):  # which need no library that may be missing
        assert texts(tmp_path / "rows", plain_tokenizer) == ["a"] * 3
    packed(kind, b'{"prompt": "a"}\n' * 2**19, path)
    with pytest.raises(DataError, match=r"must unpack to at most \d+ bytes, 100 times its size"):
        texts(tmp_path / "rows", plain_tokenizer)


def test_a_packed_line_and_a_row_group_in_a_folder_fit_into_memory(
    plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folders = [tmp_path / name for name in ("line", "table")]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "' + b"a" * 2**22 + b'"}\n'))
    pd.DataFrame({"prompt": ["a" * 2**12] * 2**10}).to_parquet(folders[1] / "rows.parquet")
    free = type("Memory", (), {"available": 2**21})
    monkeypatch.setattr(file_limits.psutil, "virtual_memory", lambda: free)
    with pytest.raises(DataError, match="must have lines of at most 1048576 bytes"):
        texts(folders[0], plain_tokenizer)
    with pytest.raises(DataError, match=r"each row group of .* must unpack to at most 1048576 bytes"):
        texts(folders[1], plain_tokenizer)


def test_a_file_of_a_folder_whose_packing_tells_no_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.7z"
    path.write_bytes(b"7z\xbc\xaf\x27\x1c" + b"0" * 99)
    with pytest.raises(DataError, match=r"must be packed as gzip, .* and is 7z; unpack it"):
        packed_files.check_file(str(path))


def test_a_tar_is_bounded_by_what_its_members_unpack_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_files, "ALWAYS_ALLOWED_BYTES", 2**16)
    path = tmp_path / "rows.tar.gz"
    for size in (2**10, 2**23):
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo("rows.jsonl")
            member.size = size
            archive.addfile(member, io.BytesIO(b"a\n" * (size // 2)))
        if size == 2**10:
            packed_files.check_file(str(path))
    with pytest.raises(DataError, match="100 times its size"):
        packed_files.check_file(str(path))


def test_a_folder_of_several_saved_splits_is_read_by_its_split(
    plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    splits = {"train": Dataset.from_list([{"prompt": "a"}]), "test": Dataset.from_list([{"prompt": "b"}])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved", plain_tokenizer, split="test") == ["b"]
    with pytest.raises(ConfigError, match=r"data\.split is 'dev', and .* has train, test"):
        texts(tmp_path / "saved", plain_tokenizer, split="dev")
    with pytest.raises(DataError, match="cannot be loaded"):
        (tmp_path / "empty").mkdir()
        texts(tmp_path / "empty", plain_tokenizer)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_a_compressed_file_in_a_saved_folder_is_bounded_before_it_is_read(
    compression: str, is_dictionary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DataSettings(path=str(tmp_path / "saved"))
    Dataset.from_dict({"prompt": ["a" * 1000]}).save_to_disk(str(settings.path))
    [path] = (tmp_path / "saved").glob("*.arrow")
    with pyarrow.ipc.open_stream(path.read_bytes()) as stream:
        schema = stream.schema

    def save(rows: list[str]) -> None:
        column = pyarrow.array(rows).dictionary_encode() if is_dictionary else pyarrow.array(rows)
        table = pyarrow.table({"prompt": column})
        kept = table.schema if is_dictionary else schema
        with pyarrow.ipc.new_stream(path, kept, options=pyarrow.ipc.IpcWriteOptions(compression=compression)) as stream:
            stream.write_table(table)

    monkeypatch.setattr(arrow_limits, "unpacked_limit", lambda size, is_packed: 2**16)
    save([str(number) * 100 for number in range(100)])
    arrow_limits.check_arrow_files(tmp_path / "saved")
    if not is_dictionary:
        assert [row["prompt"] for row in load_rows(settings)][7] == "7" * 100
    save(["a" * 2**16 + str(number) for number in range(2)])
    assert path.stat().st_size < 2**14
    with pytest.raises(DataError, match=r"\.arrow must unpack to at most 65536 bytes, .*save it without compression"):
        load_rows(settings)
