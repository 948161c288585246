"""The trainer's side of the token that every request to a server must carry: whoever has it can replace the weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

from alignlab.files.paths import server_token_file
from alignlab.network.addresses import leads_to_loopback
from alignlab.network.credentials import environment_token, token_file
from alignlab.rollout.vllm.protocol import TOKEN_VARIABLE

logger = logging.getLogger(__name__)


def server_token() -> str:
    """Return the token in `$ALIGNLAB_SERVER_TOKEN` or, without it, of a file that this user alone can read.

    The file is made on first use. It suffices if trainer and servers belong to one user on one file system.

    Raises:
        ConfigError: the token is blank or short, or others may have read or written it.
        DiskError: the file can be neither read nor made.
    """
    token = environment_token(TOKEN_VARIABLE) or token_file(server_token_file())
    return token.get_secret_value()


def warn_of_unencrypted_ways(addresses: Sequence[str]) -> None:
    """Warn of servers on other machines: token, prompts and weights can be read by anybody on the way there."""
    remote = [address for address in addresses if not leads_to_loopback(urlsplit(address).hostname or "")]
    if remote:
        logger.warning(
            "token, prompts and weights travel unencrypted to %s; use a network that you trust, or tunnels to this "
            "machine (ssh -L)",
            ", ".join(remote),
        )
