"""Paths on the command line: `~` in them, places that exist, the folder of a run in place of a model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from alignlab.cli import main, parse
from alignlab.cli.candidates import candidates_of
from alignlab.cli.places import expand_home, new_file, new_folder
from alignlab.errors import CheckpointError, ConfigError
from alignlab.runs.folder import RunFolder, refuse_run


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["generate", "~/m", "hi", "--adapter=~/a"], {"model": "m", "adapter": "a"}),
        (["eval", "--config=~/c.yaml", "--plot=~/p.png"], {"config": "c.yaml", "plot": "p.png"}),
        (["merge", "~/a", "~/out", "--model=~/m"], {"adapter": "a", "output": "out", "model": "m"}),
        (["student", "~/t", "~/out", "--num-layers", "1"], {"teacher": "t", "output": "out"}),
        (["upcycle", "~/m", "~/out", "--experts=4", "--experts-per-token=2"], {"model": "m", "output": "out"}),
        (["sample", "~/m", "--config=~/c", "--output=~/o.jsonl"], {"model": "m", "config": "c", "output": "o.jsonl"}),
        (["judge", "~/c", "--pairs=~/p", "--write-examples=~/e"], {"config": "c", "pairs": "p", "write_examples": "e"}),
        (["train", "~/c"], {"config": "c"}),
        (["check", "~/c"], {"config": "c"}),
        (["serve", "~/c"], {"config": "c"}),
    ],
)
def test_a_home_folder_that_the_shell_has_left_is_put_in(
    words: list[str], names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/of/me")
    args = parse(words)
    expand_home(args)
    assert {name: str(getattr(args, name)) for name in names} == {n: f"/home/of/me/{file}" for n, file in names.items()}


def test_a_prompt_and_a_name_with_a_tilde_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/me")
    args = parse(["generate", "owner/a~b", "~/hi"])
    expand_home(args)
    assert (args.model, args.prompt) == ("owner/a~b", "~/hi")
    assert [candidate.model for candidate in candidates_of(["a=~/m", "~/n"], None, None)] == [
        "/home/of/me/m", "/home/of/me/n",
    ]  # fmt: skip


def test_the_home_folder_of_nobody_is_a_named_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "~no-such-user/c.yaml"]) == 2
    assert "must begin with the home folder of a user" in capsys.readouterr().err
    expand_home(Namespace(model=None))


def test_an_output_must_be_new_and_a_link_that_leads_to_nothing_is_not(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "to_empty").symlink_to("empty")
    for name in ("new", "empty", "to_empty"):
        assert new_folder(str(tmp_path / name)) == tmp_path / name
    assert new_file(str(tmp_path / "new"), "--output") == tmp_path / "new"
    for name, kind in (("link", "a link that leads to nothing"), ("file", "a file")):
        with pytest.raises(ConfigError, match=f"OUTPUT must be a new or empty folder, and .*{name} is {kind}; choose"):
            new_folder(str(tmp_path / name))
        with pytest.raises(ConfigError, match=f"--output must be a new file, and .*{name} is {kind}, which is not"):
            new_file(str(tmp_path / name), "--output")
    with pytest.raises(ConfigError, match="is a folder that is not empty; choose"):
        new_folder(str(tmp_path))


def test_the_folder_of_a_run_is_refused_with_the_model_that_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    RunFolder(run, resume=False).close()
    with pytest.raises(CheckpointError, match="has written no model and no adapter yet; finish it by alignlab train"):
        refuse_run(str(run), "MODEL")
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    for words, argument in (
        (["generate", str(run), "hi"], "MODEL"),
        (["merge", str(run), str(tmp_path / "out")], "ADAPTER"),
        (["student", str(run), str(tmp_path / "out"), "--num-layers", "1"], "TEACHER"),
    ):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert f"{argument} must be a model or an adapter, and {run} is a run, which has written" in told
        assert f"give {run / 'adapter'}" in told
    refuse_run(str(run / "adapter"), "MODEL")
    refuse_run("owner/model", "MODEL")
