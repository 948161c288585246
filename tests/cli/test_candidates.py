"""What MODEL on the command line of `alignlab eval` means."""

from pathlib import Path

import pytest

from alignlab.cli.candidates import Candidate, candidates_of, split_label
from alignlab.errors import AlignlabError


def made(folder: Path, *files: str) -> str:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return str(folder)


def test_a_hub_id_or_a_packaged_model_is_taken_as_it_is():
    assert candidates_of(["org/name"], None, None) == [Candidate("org/name", "org/name")]
    assert candidates_of([], None, "smollm2") == [Candidate("smollm2", "smollm2")]
    assert candidates_of(["base"], "some/adapter", "other") == [Candidate("base", "base", "some/adapter")]
    assert candidates_of([], "some/adapter", "other") == [Candidate("some/adapter", "some/adapter")]


@pytest.mark.parametrize("inside", ["adapter/adapter_config.json", "model/config.json"])
def test_of_a_run_its_adapter_or_model_is_taken(tmp_path, inside):
    run = made(tmp_path / "run", "starts.jsonl", inside)
    expected = str((tmp_path / "run" / inside).parent)
    assert candidates_of([run], None, None) == [Candidate(run, expected, is_as_given=False)]
    [labelled] = candidates_of([f"mine={run}"], None, None)
    assert labelled == Candidate("mine", expected, labelled=True, is_as_given=False)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_a_checkpoint_is_no_run_whatever_lies_beside_it(tmp_path, file):
    folder = made(tmp_path / "model", file, "model/config.json", "starts.jsonl")
    assert candidates_of([folder], None, None)[0].model == folder


def test_labels_paths_and_settings_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made(Path("rate=1e-4"), "config.json")
    assert split_label("rate=1e-4") == (None, "rate=1e-4"), "it is there"
    assert split_label("./x=1/model") == (None, "./x=1/model"), "a path"
    assert split_label("lr=1e-4=rate=1e-4") == ("lr", "1e-4=rate=1e-4")
    assert split_label("v1.2=org/name") == ("v1.2", "org/name")


@pytest.mark.parametrize(
    ("words", "adapter", "message"),
    [
        (["trainer.seed=1"], None, "write --set trainer.seed=1"),
        (["rewards=[]"], None, "which is a setting"),
        (["=org/name"], None, "LABEL=MODEL with both"),
        (["a="], None, "LABEL=MODEL with both"),
        (["org/a", "org/b"], "some/adapter", "--adapter is some/adapter, and goes with one MODEL, and 2 are given"),
        (["org/a", "org/a"], None, "given twice.*a=org/a"),
        (["x=org/a", "x=org/b"], None, "x is given twice"),
        ([], None, "give MODEL or --adapter"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, adapter, message):
    with pytest.raises(AlignlabError, match=message):
        candidates_of(words, adapter, None)


def test_a_run_that_has_made_nothing_is_named(tmp_path):
    run = made(tmp_path / "run", "starts.jsonl")
    with pytest.raises(AlignlabError, match="has written no adapter and no model yet"):
        candidates_of([run], None, None)
