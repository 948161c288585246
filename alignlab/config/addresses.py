"""The rule of every setting that is a server's address."""

from __future__ import annotations

from urllib.parse import urlsplit

from alignlab.addresses import redacted, secret_part
from alignlab.config.messages import BrokenRule

_MAX_CHARACTERS = 2048
_FIX = (
    "remove it: a judge's key belongs into the environment variable that judge.api_key_env names, the token of vLLM "
    "servers into ALIGNLAB_SERVER_TOKEN"
)


def check_address(
    field: str, url: str, *, must: str, schemes: tuple[str, ...], port: bool = False, path: bool = True
) -> None:
    """Raise if a setting is no address, or one that may hold a secret: it would be kept in the run's config.

    Args:
        field: the setting.
        must: what the setting must be, completing "and must ...".
        schemes: that are possible.
        port, path: whether the address must name a port, and may have a path.

    Raises:
        BrokenRule: it is; the message shows no secret.
    """
    shown = redacted(url)
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in schemes and bool(parts.hostname) and bool(parts.port or not port)
    except ValueError:  # a bracket without its other, or a port that is no number
        is_address = False
    is_clean = url.isascii() and url.isprintable() and " " not in url and len(url) <= _MAX_CHARACTERS
    if not is_address or not is_clean or not (path or parts.path in ("", "/")):
        raise BrokenRule(field, shown, must, f"correct {shown:.80}")
    secret = secret_part(url)
    if secret is not None:
        raise BrokenRule(field, shown, f"have no {secret}, which files and messages would show", _FIX)
