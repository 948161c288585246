"""The processes of the servers: started with what a run's config says, watched, started again, ended together."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio

from alignlab.addresses import listens_beyond
from alignlab.errors import ConfigError, RolloutError
from alignlab.rollout.vllm.server.access import SERVED_NAME, VARIABLE, server_token
from alignlab.rollout.vllm.server.client import is_healthy

logger = logging.getLogger(__name__)
MAX_RESTARTS = 3
STEADY_S = 600.0
UNHEALTHY_S = 60.0
START_S = 1800.0
"""Loading a model and its kernels; vLLM itself gives its engine 600 s."""
_MODULE = "vllm.entrypoints.launchers.api_server.entry"
_OURS = "alignlab.rollout.vllm"
_PLUGINS = ("vllm.general_plugins", "vllm.platform_plugins")
_GRACE_S = 10.0
_TELL_EVERY_S = 60.0
_PAUSE_S = 0.5


@dataclass
class ServerProcess:
    """One server.

    Attributes:
        address: where it answers.
        command: that starts it.
        environment: of the process.
        was_up: it has answered once since it was started last.
        num_restarts: since it was last up for `STEADY_S`.
        started_at, healthy_at, up_at: when it was started last, answered last, and first since it was started, by
            `time.monotonic`.
        told_at: when it was last said that it is not up yet, by the same clock.
    """

    address: str
    command: list[str]
    environment: dict[str, str] = field(repr=False)  # the token is in it
    was_up: bool = False
    num_restarts: int = 0
    started_at: float = 0.0
    healthy_at: float = 0.0
    up_at: float = 0.0
    told_at: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it; what it says goes to standard error."""
        self.was_up, self.started_at = False, time.monotonic()
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(),
            start_new_session=True,  # Ctrl-C reaches it through us
        )

    def answers(self) -> bool:
        """Whether it is up."""
        return anyio.run(is_healthy, self.address)

    def stop(self, sign: signal.Signals) -> None:
        """Send a signal to it and to the processes that it started, which may live longer than it does."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)


    def reap(self) -> None:
        """Wait for the end of a process that was killed, and warn of one that the kernel does not let go."""
        if self.process is not None:
            try:
                self.process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                logger.warning(
                    "process %d of the server %s was killed and has not ended within %g s: a device or a disk holds it",
                    self.process.pid, self.address, _GRACE_S,
                )  # fmt: skip


def make_server(
    address: str, folder: Path, options: Mapping[str, Any], *, device: str | None = None
) -> ServerProcess:
    """The server of a checkpoint folder at an address, not yet started.

    Args:
        options: of vLLM's engine, by their names in Python.
        device: what CUDA_VISIBLE_DEVICES is to be.

    Raises:
        ConfigError: something else listens there, or the address is not this machine's.
    """
    parts = urlsplit(address)
    assert parts.hostname is not None and parts.port is not None
    _require_free(address, parts.hostname, parts.port)
    if listens_beyond(parts.hostname):
        logger.warning(
            "the server %s can be reached from other machines: its token protects it, and nothing encrypts what "
            "travels; listen at 127.0.0.1, or use a network that you trust",
            address,
        )
    given = dict(options) | {
        "model": str(folder), "served_model_name": SERVED_NAME, "host": parts.hostname, "port": parts.port,
        "middleware": f"{_OURS}.server.access.TokenGuard", "enable_scale_out": True,
        "uvicorn_log_level": "warning", "disable_uvicorn_access_log": True, "disable_fastapi_docs": True,
        "use_tqdm_on_load": False,
    }
    environment = os.environ | _defaults() | {VARIABLE: server_token(), "VLLM_PLUGINS": _plugins()}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    return ServerProcess(address, [sys.executable, "-m", _MODULE, *_flags(given)], environment)


def wait_until_up(server: ServerProcess) -> None:
    """Wait for a server that was started.

    Raises:
        RolloutError: it ends instead, or is not up within `START_S`.
    """
    while not server.was_up:
        _look_after(server, lambda text: None)
        time.sleep(_PAUSE_S)


def keep_running(servers: Sequence[ServerProcess], tell: Callable[[str], None]) -> None:
    """Start the servers and see that they run, until a signal ends the process; then none is left.

    One that ends after it was up, or does not answer for `UNHEALTHY_S`, is started again, up to `MAX_RESTARTS` times in
    a row; one that ends more often is given up, and the others go on. One that is not up within `START_S` counts as
    ended.

    Raises:
        RolloutError: one ends before it was ever up, or none is left.
    """
    running = list(servers)
    try:
        for server in running:
            server.start()
        while running:
            for server in list(running):
                if not _look_after(server, tell):
                    running.remove(server)
            time.sleep(_PAUSE_S)
        raise RolloutError("no server is left; what vLLM said is above")
    finally:
        end_all(servers)


def _look_after(server: ServerProcess, tell: Callable[[str], None]) -> bool:
    """Whether the server is to be looked after any longer."""
    how = _failure(server, tell)
    if how is None:
        return True
    assert server.process is not None
    server.stop(signal.SIGKILL)  # what it started holds memory that the next one needs
    if not server.was_up and server.num_restarts == 0:
        raise RolloutError(
            f"the server {server.address} {how} before it was up; what vLLM said is above: correct the model or "
            "rollout's sizes"
        )
    if server.num_restarts >= MAX_RESTARTS:
        tell(f"{server.address} {how}, {MAX_RESTARTS} times after it was started again; it is given up")
        return False
    server.num_restarts += 1
    tell(f"{server.address} {how}; starting it again")
    server.reap()
    server.start()
    return True


def _failure(server: ServerProcess, tell: Callable[[str], None]) -> str | None:
    """What has become of a server; None where it is well, or still may be."""
    assert server.process is not None
    status, now = server.process.poll(), time.monotonic()
    if status is not None:
        return f"ended with status {status}"
    if not server.was_up and now - max(server.started_at, server.told_at) >= _TELL_EVERY_S:
        tell(f"{server.address} is not up after {now - server.started_at:.0f} s; it is given {START_S:g} s to load")
        server.told_at = now
    if not server.answers():
        patience_s, since = (UNHEALTHY_S, server.healthy_at) if server.was_up else (START_S, server.started_at)
        return f"did not answer for {patience_s:g} s" if now - since >= patience_s else None
    if not server.was_up:
        tell(f"{server.address} is up")
        server.was_up, server.up_at = True, now
    if now - server.up_at > STEADY_S:
        server.num_restarts = 0
    server.healthy_at = now
    return None


def end_all(servers: Sequence[ServerProcess]) -> None:
    """End them, by force where they take too long."""
    for server in servers:
        server.stop(signal.SIGTERM)
    for server in servers:
        if server.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(_GRACE_S)
            server.stop(signal.SIGKILL)
            server.reap()


def _require_free(address: str, host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"a server cannot listen at {address}: {error.strerror}; end what uses the port, change "
                "trainer.rollout.servers, or start only this machine's servers (--only)"
            ) from error


def _defaults() -> dict[str, str]:
    """Nothing is reported to anybody, and processes that share cores do not wait for each other's threads."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_WAIT_POLICY": "passive",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONWARNINGS": "ignore",
    }
    return {name: value for name, value in defaults.items() if name not in os.environ}


def _plugins() -> str:
    """Plug-ins that vLLM is to load: those it would, and our endpoints, which it loads by name alone."""
    named = os.environ.get("VLLM_PLUGINS")
    usual = [entry.name for group in _PLUGINS for entry in entry_points(group=group)]
    return ",".join(dict.fromkeys([*(usual if named is None else named.split(",")), "alignlab"]))


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Options as vLLM's command line has them."""
    flags: list[str] = []
    for name, value in options.items():
        dashed = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{dashed}" if value else f"--no-{dashed}")
        else:
            flags += [f"--{dashed}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
