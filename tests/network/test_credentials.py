"""Tokens and addresses: what protects nothing is refused, and what is secret is not shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignlab.errors import ConfigError, DiskError
from alignlab.network.addresses import is_loopback, leads_to_loopback, listens_beyond, redacted
from alignlab.network.credentials import environment_token, token_file
from alignlab.rollout.vllm.access import server_token
from alignlab.rollout.vllm.protocol import TOKEN_VARIABLE


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the token, where there is none yet."""
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "server-token"


def test_the_token_is_created_once_and_readable_by_its_user_alone(path: Path) -> None:
    previous = os.umask(0)
    try:
        token = server_token()
    finally:
        os.umask(previous)
    assert len(token) > 30 and server_token() == token == path.read_text()
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_token_and_its_folder_are_synced_before_use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", noted)
    server_token()
    assert len(synced) == 2 and Path(synced[0]).parent == path.parent == Path(synced[1])


def test_many_processes_that_make_the_token_at_once_have_one(path: Path) -> None:
    script = "from alignlab.network.credentials import token_file; import pathlib, sys; sys.stdin.read(1); " \
        "print(token_file(pathlib.Path(sys.argv[1])).get_secret_value())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert len({process.communicate("x")[0] for process in processes}) == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is blank"), (" \n", "is blank"), ("short", r"at least 16 characters, and has 5"),
        ("with a space in it, and long", "printable ASCII"), ("\u00e9" * 20, "printable ASCII"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_token_is_refused(content: str, why: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=rf"{path} must hold .*{why}.*delete the file \(rm {path}\)") as raised:
        server_token()
    assert not content.strip() or content not in str(raised.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o644, 0o601])
def test_a_token_that_others_may_have_read_or_written_is_refused(mode: int, path: Path) -> None:
    token = server_token()
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"has the permissions {mode:o}; run chmod 600 {path}") as raised:
        server_token()
    assert token not in str(raised.value)


def test_a_token_in_a_link_a_pipe_or_a_folder_is_refused(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("x" * 40)
    elsewhere.chmod(0o600)
    path.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="must be a plain file, and is a link"):
        server_token()
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="must be a plain file, and is a link"):
        server_token()
    path.unlink()
    os.mkfifo(path, 0o600)  # nobody writes to it: to wait for its reader would be to wait for ever
    with pytest.raises(ConfigError, match="must be a plain file, and is none"):
        server_token()
    path.unlink()
    path.mkdir(0o700)
    with pytest.raises((ConfigError, DiskError), match=str(path)):
        server_token()


def test_a_token_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server_token()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match=r"must belong to this user, and belongs to the user \d+"):
        server_token()


def test_a_place_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"the servers' token cannot be written to .*"):
        token_file(tmp_path / "file" / "server-token")


@pytest.mark.parametrize(
    ("value", "why"), [("", "is blank"), ("  ", "is blank"), ("short", "has 5"), ("a b" * 10, "printable ASCII")]
)
def test_a_token_in_the_environment_has_the_same_rules(value: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, value)
    with pytest.raises(ConfigError, match=rf"variable {TOKEN_VARIABLE} must hold .*{why}.*export {TOKEN_VARIABLE}="):
        server_token()


def test_a_token_has_no_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "  a-token-of-the-tests\n")
    token = environment_token(TOKEN_VARIABLE)
    assert token is not None and token.get_secret_value() == "a-token-of-the-tests"
    assert "a-token" not in f"{token!r} {token}"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.9.9", "127.1", "0x7f.1", "2130706433", "::1",
             "[::1]", "::ffff:127.0.0.1", "::1%lo"],
)  # fmt: skip
def test_every_spelling_of_this_machine_is_known(host: str) -> None:
    assert is_loopback(host) and leads_to_loopback(host) and not listens_beyond(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0"])
def test_the_any_address_listens_everywhere_and_leads_to_this_machine(host: str) -> None:
    assert not is_loopback(host) and leads_to_loopback(host) and listens_beyond(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "128.0.0.1", "fe80::1", "8.8.8.8"])
def test_other_machines_are_not_loopback(host: str) -> None:
    assert not is_loopback(host) and not leads_to_loopback(host)


def test_an_address_is_shown_without_secrets() -> None:
    assert redacted("http://me:key@host:1/v1?key=key#key") == "http://***@host:1/v1?***"
    assert redacted("http://me:k@y@host/") == "http://***@host/"
    assert redacted("http://host:1/v1") == "http://host:1/v1"
