"""Server processes: started from a run's config, watched, restarted, ended together."""

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

from alignlab.errors import ConfigError, RolloutError
from alignlab.network.addresses import listens_beyond
from alignlab.rollout.vllm.access import server_token
from alignlab.rollout.vllm.client import is_healthy
from alignlab.rollout.vllm.installation import MODEL_RUNNER_VARIABLE, pinned_model_runner
from alignlab.rollout.vllm.protocol import SERVED_NAME, TOKEN_VARIABLE

logger = logging.getLogger(__name__)
MAX_RESTARTS = 3
STEADY_S = 600.0
UNHEALTHY_S = 60.0
START_S = 1800.0
"""Limit for loading a model and its kernels; vLLM's own limit for its engine is 600 s."""
_MODULE = "vllm.entrypoints.launchers.api_server.entry"
_MIDDLEWARE = "alignlab.rollout.vllm.inside.token_guard.TokenGuard"
_PLUGINS = ("vllm.general_plugins", "vllm.platform_plugins")
_GRACE_S = 10.0
_REPORT_EVERY_S = 60.0
_PAUSE_S = 0.5


@dataclass
class ServerProcess:
    """A server's process. Times are by `time.monotonic`.

    Attributes:
        address: http://HOST:PORT.
        command: command line that starts the server.
        environment: environment of the process.
        was_up: the server has answered since its last start.
        num_restarts: restarts since the server was last up for `STEADY_S`.
        started_at: time of the last start.
        up_at: time of the first answer since then.
        healthy_at: time of the last answer.
        reported_at: time of the last message that the server is not up yet.
    """

    address: str
    command: list[str]
    environment: dict[str, str] = field(repr=False)  # holds the token
    was_up: bool = False
    num_restarts: int = 0
    started_at: float = 0.0
    healthy_at: float = 0.0
    up_at: float = 0.0
    reported_at: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start the process; its output goes to standard error."""
        self.was_up, self.started_at = False, time.monotonic()
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(),
            start_new_session=True,  # Ctrl-C is for this process, which then ends the servers
        )

    def is_healthy(self) -> bool:
        """Return True if the server answers its health check."""
        return anyio.run(is_healthy, self.address)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and to its children, which may outlive it."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def reap(self) -> None:
        """Wait for the end of a process that was killed; warn if it does not end."""
        if self.process is not None:
            try:
                self.process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                logger.warning(
                    "process %d of the server %s was killed and has not ended within %g s: a device or a disk holds it",
                    self.process.pid, self.address, _GRACE_S,
                )  # fmt: skip


def make_server(
    address: str, folder: Path, options: Mapping[str, Any], *, devices: str | None = None,
    num_threads: int | None = None,
) -> ServerProcess:
    """Return a server of a checkpoint folder, not yet started.

    Args:
        address: http://HOST:PORT, of this machine.
        options: options of vLLM's engine, by their names in Python.
        devices: value of CUDA_VISIBLE_DEVICES; default: this process's.
        num_threads: of each of the server's processes, unless OMP_NUM_THREADS says it; default: as many as cores.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    url = urlsplit(address)
    assert url.hostname is not None and url.port is not None
    _require_free(address, url.hostname, url.port)
    if listens_beyond(url.hostname):
        logger.warning(
            "the server %s can be reached from other machines: its token protects it, and nothing encrypts what "
            "travels; listen at 127.0.0.1, or use a network that you trust",
            address,
        )
    all_options = dict(options) | {
        "model": str(folder), "served_model_name": SERVED_NAME, "host": url.hostname, "port": url.port,
        "middleware": _MIDDLEWARE, "enable_scale_out": True,
        "uvicorn_log_level": "warning", "disable_uvicorn_access_log": True, "disable_fastapi_docs": True,
        "use_tqdm_on_load": False,
    }
    command = [sys.executable, "-m", _MODULE, *_flags(all_options)]
    return ServerProcess(address, command, server_environment(devices, num_threads) | {TOKEN_VARIABLE: server_token()})


def server_environment(devices: str | None = None, num_threads: int | None = None) -> dict[str, str]:
    """Return the environment of a server's process, without the token; see `make_server`."""
    own = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    if num_threads is not None and "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = str(num_threads)
    return os.environ | _defaults() | own | {"VLLM_PLUGINS": _plugins()}


def keep_running(servers: Sequence[ServerProcess], report: Callable[[str], None]) -> None:
    """Start the servers and keep them running until a signal ends this process; end them with it.

    A server that ends after it was up, or does not answer for `UNHEALTHY_S`, is restarted, up to `MAX_RESTARTS` times
    in a row; after that it is given up, and the others go on. A server that is not up within `START_S` counts as ended.

    Args:
        report: takes a message for the user.

    Raises:
        RolloutError: a server ends before it was ever up, or none is left.
    """
    running = list(servers)
    try:
        for server in running:
            server.start()
        while running:
            for server in list(running):
                if not _supervise(server, report):
                    running.remove(server)
            time.sleep(_PAUSE_S)
        raise RolloutError("no server is left; see vLLM's messages above")
    finally:
        end_all(servers)


def _supervise(server: ServerProcess, report: Callable[[str], None]) -> bool:
    """Restart a server that failed; return False if the server is given up."""
    failure = _failure(server, report)
    if failure is None:
        return True
    assert server.process is not None
    server.send_signal(signal.SIGKILL)  # its children hold memory that the next start needs
    if not server.was_up and server.num_restarts == 0:
        raise RolloutError(
            f"the server {server.address} {failure} before it was up; see vLLM's messages above, and correct the model "
            "or rollout's sizes"
        )
    if server.num_restarts >= MAX_RESTARTS:
        report(f"{server.address} {failure}, after {MAX_RESTARTS} restarts; it is given up")
        return False
    server.num_restarts += 1
    report(f"{server.address} {failure}; starting it again")
    server.reap()
    server.start()
    return True


def _failure(server: ServerProcess, report: Callable[[str], None]) -> str | None:
    """Return the failure of a server; None if it is healthy, or may still become so."""
    assert server.process is not None
    status, now_s = server.process.poll(), time.monotonic()
    if status is not None:
        return f"ended with status {status}"
    if not server.was_up and now_s - max(server.started_at, server.reported_at) >= _REPORT_EVERY_S:
        report(f"{server.address} is not up after {now_s - server.started_at:.0f} s; it is given {START_S:g} s to load")
        server.reported_at = now_s
    if not server.is_healthy():
        patience_s, since = (UNHEALTHY_S, server.healthy_at) if server.was_up else (START_S, server.started_at)
        return f"did not answer for {patience_s:g} s" if now_s - since >= patience_s else None
    if not server.was_up:
        report(f"{server.address} is up")
        server.was_up, server.up_at = True, now_s
    if now_s - server.up_at > STEADY_S:
        server.num_restarts = 0
    server.healthy_at = now_s
    return None


def end_all(servers: Sequence[ServerProcess]) -> None:
    """End the servers, by force after a grace period."""
    for server in servers:
        server.send_signal(signal.SIGTERM)
    for server in servers:
        if server.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(_GRACE_S)
            server.send_signal(signal.SIGKILL)
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
    """Return environment variables without usage statistics, and with threads that do not spin while they wait."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_WAIT_POLICY": "passive",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONWARNINGS": "ignore", MODEL_RUNNER_VARIABLE: pinned_model_runner(),
    }
    return {name: value for name, value in defaults.items() if name not in os.environ}


def _plugins() -> str:
    """Return the plug-ins that vLLM has to load: the usual ones, and our endpoints, which it loads only if named."""
    named = os.environ.get("VLLM_PLUGINS")
    installed = [entry.name for group in _PLUGINS for entry in entry_points(group=group)]
    return ",".join(dict.fromkeys([*(installed if named is None else named.split(",")), "alignlab"]))


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Return options in the form of vLLM's command line."""
    flags: list[str] = []
    for name, value in options.items():
        dashed = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{dashed}" if value else f"--no-{dashed}")
        else:
            flags += [f"--{dashed}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
