"""Keys and tokens: created, read from a file or the environment, and refused if they are too weak or exposed.

No error message shows one.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from pydantic import SecretStr

from alignlab.errors import ConfigError
from alignlab.files.library_errors import writing

MIN_TOKEN_CHARACTERS = 16
_MAX_BYTES = 4096
_NEW_TOKEN = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"


def environment_key(variable: str, setting: str) -> SecretStr:
    """Return the key in an environment variable.

    Args:
        variable: name of the variable.
        setting: setting that names the variable, such as judge.api_key_env.

    Raises:
        ConfigError: the variable is not set or blank, or no HTTP header can hold the key.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"{setting} names the environment variable {variable}, and it is {_absence(variable)}; set it, or remove "
            f"{setting.rpartition('.')[2]} for a server without keys"
        )
    if not _fits_header(key):
        raise ConfigError(
            f"the environment variable {variable} ({setting}) must hold printable ASCII without spaces, and holds "
            "something else; copy the key again"
        )
    return SecretStr(key)


def environment_token(variable: str) -> SecretStr | None:
    """Return the token in an environment variable; None if the variable is not set.

    Raises:
        ConfigError: the token is blank or short, or no HTTP header can hold it.
    """
    if variable not in os.environ:
        return None
    fix = f'export {variable}="$({_NEW_TOKEN})"'
    return checked_token(os.environ[variable], f"the environment variable {variable}", fix)


def checked_token(text: str, place: str, fix: str) -> SecretStr:
    """Return a token that is strong enough.

    Args:
        place: source of the token, for the message.
        fix: advice for the message.

    Raises:
        ConfigError: the token is blank or short, or no HTTP header can hold it.
    """
    token = text.strip()
    if not token:
        raise ConfigError(f"{place} must hold a token, and is blank; {fix}")
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ConfigError(
            f"{place} must hold a token of at least {MIN_TOKEN_CHARACTERS} characters, and has {len(token)}; {fix}"
        )
    if not _fits_header(token):
        raise ConfigError(f"{place} must hold printable ASCII without spaces, and holds something else; {fix}")
    return SecretStr(token)


def token_file(path: Path) -> SecretStr:
    """Return the token in a file that this user alone may read; the file is created on first use.

    The file appears complete, and is on the disk when this function returns.

    Raises:
        ConfigError: the file belongs to another user, is readable by others, no plain file, or holds no token.
        DiskError: the file can be neither read nor created.
    """
    with writing(path, "the servers' token"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            _make(path)
        text = _read_private(path)
    return checked_token(text, str(path), f"delete the file ({_removal(path)}), and the next start makes one")


def _make(path: Path) -> None:
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
            file.flush()
            os.fsync(file.fileno())
        os.link(unfinished, path)  # fails if another process was faster, and never shows half a file
    except FileExistsError:
        pass
    finally:
        unfinished.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_private(path: Path) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if not path.is_symlink():
            raise
        raise ConfigError(f"{path} must be a plain file, and is a link; delete it ({_removal(path)})") from error
    with os.fdopen(descriptor, "rb") as file:
        _check_private(path, os.fstat(descriptor))
        return file.read(_MAX_BYTES).decode("ascii", errors="replace")


def _check_private(path: Path, status: os.stat_result) -> None:
    """Raise if other users may have written or read a file.

    Raises:
        ConfigError: with the command that corrects it.
    """
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} must be a plain file, and is none; delete it ({_removal(path)})")
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} must belong to this user, and belongs to the user {status.st_uid}; delete it "
            f"({_removal(path)}), or set ALIGNLAB_CACHE to a folder of your own"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"{path} must be readable by this user alone, and has the permissions {stat.S_IMODE(status.st_mode):03o}; "
            f"run chmod 600 {path} or, where others may have read it, delete it, and a new one is made"
        )


def _removal(path: Path) -> str:
    return f"rm {path}"


def _fits_header(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _absence(variable: str) -> str:
    return "blank" if variable in os.environ else "not set"
