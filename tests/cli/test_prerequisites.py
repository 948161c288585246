"""A config that names what another has still to make is refused with the command that makes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.cli.prerequisites import check_prerequisites
from alignlab.config.loader import load_config
from alignlab.errors import ConfigError, DiskError
from alignlab.files.input_files import MAX_SETTINGS_BYTES, read_json_object

GRPO: dict[str, Any] = {
    "model": {"name": "some/model"}, "data": {"task": "products"}, "rewards": [{"name": "exact_match"}],
    "trainer": {"type": "grpo"},
}  # fmt: skip
SFT: dict[str, Any] = {"model": {"name": "some/model"}, "data": {"path": "rows.jsonl"}, "trainer": {"type": "sft"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "configs").mkdir()
    return tmp_path / "configs"


def write(file: Path, settings: dict[str, Any], comment: str = "", **trainer: Any) -> Path:
    whole = settings | {"trainer": settings["trainer"] | trainer}
    file.write_text(comment + yaml.safe_dump(whole))
    return file


def check(file: Path) -> None:
    check_prerequisites(load_config(Path("configs") / file.name), Path("configs") / file.name)


def with_setting(name: str, value: str) -> dict[str, Any]:
    """A config that names `value` in one of the places where a result is named."""
    teacher = {"type": "gkd", "teacher": {"name": value}}
    judge = {"name": value}
    rlaif = {"type": "rlaif", "path": "direct", "judge": judge, "constitution": "helpful", "policy": {"type": "grpo"}}
    return {
        "model.name": GRPO | {"model": {"name": value}},
        "model.tokenizer": GRPO | {"model": {"name": "some/model", "tokenizer": value}},
        "data.path": SFT | {"data": {"path": value}},
        "rewards.0.options.model": GRPO | {"rewards": [{"name": "reward_model", "options": {"model": value}}]},
        "trainer.teacher.name": GRPO | {"trainer": teacher},
        "trainer.judge.name": {k: v for k, v in GRPO.items() if k != "rewards"} | {"trainer": rlaif},
    }[name]


@pytest.mark.parametrize(
    "setting",
    ["model.name", "model.tokenizer", "data.path", "rewards.0.options.model", "trainer.teacher.name",
     "trainer.judge.name"],
)  # fmt: skip
def test_a_missing_result_names_the_run_that_makes_it(setting: str, folder: Path) -> None:
    write(folder / "first.yaml", GRPO, output_dir="runs/first")
    second = write(folder / "second.yaml", with_setting(setting, "runs/first/model"), output_dir="runs/second")
    with pytest.raises(ConfigError) as error:
        check(second)
    assert str(error.value) == (
        f"{setting} is runs/first/model, which does not exist yet; make it first: alignlab train configs/first.yaml"
    )
    (folder.parent / "runs" / "first" / "model").mkdir(parents=True)
    check(second)


def test_a_run_that_was_begun_is_to_be_resumed(folder: Path) -> None:
    write(folder / "first.yaml", GRPO, output_dir="runs/first")
    second = write(folder / "second.yaml", with_setting("model.name", "runs/first/model"), output_dir="runs/second")
    (folder.parent / "runs" / "first").mkdir(parents=True)
    (folder.parent / "runs" / "first" / "starts.jsonl").touch()
    with pytest.raises(ConfigError, match=r"alignlab train configs/first\.yaml --resume, whose run has not come"):
        check(second)


@pytest.mark.parametrize(
    ("comment", "path", "command"),
    [
        (
            "# First (a minute): alignlab train configs/first.yaml trainer.output_dir=runs/teacher\n"
            "#   trainer.num_steps=3\n# and nothing else.\n",
            "runs/teacher/model",
            "alignlab train configs/first.yaml trainer.output_dir=runs/teacher trainer.num_steps=3",
        ),
        (
            "# Samples:\n#   alignlab sample runs/teacher/model --config configs/first.yaml \\\n"
            "#     --output runs/samples.jsonl --num-samples 1\n",
            "runs/samples.jsonl",
            "alignlab sample runs/teacher/model --config configs/first.yaml --output runs/samples.jsonl "
            "--num-samples 1",
        ),
        (
            "# alignlab judge configs/first.yaml --write-examples runs/judged.jsonl\n",
            "runs/judged.jsonl",
            "alignlab judge configs/first.yaml --write-examples runs/judged.jsonl",
        ),
        (
            "# alignlab merge runs/first/adapter runs/merged\n", "runs/merged",
            "alignlab merge runs/first/adapter runs/merged",
        ),
    ],
)  # fmt: skip
def test_a_command_in_a_comment_is_named(comment: str, path: str, command: str, folder: Path) -> None:
    write(folder / "first.yaml", GRPO, output_dir="runs/first")
    second = write(folder / "second.yaml", SFT | {"data": {"path": path}}, comment, output_dir="runs/second")
    with pytest.raises(ConfigError) as error:
        check(second)
    assert str(error.value).endswith(f"make it first: {command}")


def test_what_a_command_reads_is_not_what_it_makes(folder: Path) -> None:
    comment = "# alignlab sample runs/teacher/model --output runs/samples.jsonl\n"
    second = write(folder / "second.yaml", with_setting("model.name", "runs/teacher/model"), comment, output_dir="b")
    check(second)


def test_paths_that_no_config_makes_and_a_run_s_own_folder_are_left_alone(folder: Path) -> None:
    (folder / "broken.yaml").write_text("model: [")
    own = write(folder / "own.yaml", with_setting("model.name", "runs/other/model"), output_dir="runs/own")
    check(own)


def test_an_absolute_path_is_found_too(folder: Path) -> None:
    write(folder / "first.yaml", GRPO, output_dir=str(folder.parent / "runs" / "first"))
    second = write(folder / "second.yaml", with_setting("model.name", "runs/first/adapter"), output_dir="runs/second")
    with pytest.raises(ConfigError, match=r"alignlab train configs/first\.yaml"):
        check(second)


def test_pipes_folders_and_broken_links_beside_a_config_do_not_stop_it(folder: Path) -> None:
    """An editor leaves such a link beside a file that is open, and a pipe would be waited for without an end."""
    os.mkfifo(folder / "pipe.yaml")
    (folder / "folder.yaml").mkdir()
    (folder / ".#open.yaml").symlink_to("user@host.1234")
    (folder / "large.yaml").write_bytes(b"#" * (MAX_SETTINGS_BYTES + 1))
    write(folder / "first.yaml", GRPO, output_dir="runs/first")
    second = write(folder / "second.yaml", with_setting("model.name", "runs/first/model"), output_dir="runs/second")
    with pytest.raises(ConfigError, match="make it first: alignlab train configs/first"):
        check(second)
    with pytest.raises(ConfigError, match=r"pipe\.yaml must be a YAML file"):
        load_config(folder / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml must be a file, and is a pipe"):
        read_json_object(folder / "pipe.yaml", ConfigError)


def test_a_config_s_name_that_no_file_can_have_is_refused_by_name() -> None:
    with pytest.raises(DiskError, match=r"config cannot be read from .*File name too long; use a shorter path"):
        load_config("x" * 300)
