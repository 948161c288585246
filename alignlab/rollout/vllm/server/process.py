"""The processes of the servers: started with what a run's config says, watched, started again, ended together."""

from __future__ import annotations

import json
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

import httpx2

from alignlab.errors import ConfigError, RolloutError
from alignlab.rollout.vllm.server.access import SERVED_NAME, VARIABLE, server_token

MAX_RESTARTS = 3
_MODULE = "vllm.entrypoints.launchers.api_server.entry"
_OURS = "alignlab.rollout.vllm"
_PLUGINS = ("vllm.general_plugins", "vllm.platform_plugins")
_GRACE_S = 10.0
_PAUSE_S = 0.25


@dataclass
class ServerProcess:
    """One server.

    Attributes:
        address: where it answers.
        command: that starts it.
        environment: of the process.
        was_up: it has answered once since it was started last.
        num_restarts: so far.
    """

    address: str
    command: list[str]
    environment: dict[str, str]
    was_up: bool = False
    num_restarts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it; what it says goes to standard error."""
        self.was_up = False
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(),
            start_new_session=True,  # Ctrl-C reaches it through us
        )

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            return httpx2.get(f"{self.address}/health", timeout=5.0, trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self, sign: signal.Signals) -> None:
        """Send a signal to it and to the processes that it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, sign)


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
        RolloutError: it ends instead.
    """
    while not server.was_up:
        _look_after(server, lambda text: None)
        time.sleep(_PAUSE_S)


def keep_running(servers: Sequence[ServerProcess], tell: Callable[[str], None]) -> None:
    """Start the servers and see that they run, until a signal ends the process; then none is left.

    One that ends after it was up is started again, `MAX_RESTARTS` times.

    Raises:
        RolloutError: one ends before it is up, or too often.
    """
    try:
        for server in servers:
            server.start()
        while True:
            for server in servers:
                _look_after(server, tell)
            time.sleep(_PAUSE_S)
    finally:
        end_all(servers)


def _look_after(server: ServerProcess, tell: Callable[[str], None]) -> None:
    assert server.process is not None
    status = server.process.poll()
    if status is None:
        if not server.was_up and server.answers():
            server.was_up = True
            tell(f"{server.address} is up")
        return
    if not server.was_up or server.num_restarts >= MAX_RESTARTS:
        when = f"after {server.num_restarts} restarts" if server.was_up else "before it was up"
        raise RolloutError(
            f"the server {server.address} ended with status {status} {when}; what vLLM said is above: correct the "
            "model or rollout's sizes"
        )
    server.num_restarts += 1
    tell(f"{server.address} ended with status {status}; starting it again")
    server.start()


def end_all(servers: Sequence[ServerProcess]) -> None:
    """End them, by force where they take too long."""
    for server in servers:
        server.stop(signal.SIGTERM)
    for server in servers:
        if server.process is not None:
            try:
                server.process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                server.stop(signal.SIGKILL)
                server.process.wait()


def _require_free(address: str, host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"a server cannot listen at {address}: {error.strerror}; end what uses the port, or change "
                "trainer.rollout.servers"
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
