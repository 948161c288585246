"""Requests that a server must refuse: method, path, headers, body, and the status of the answer."""

from __future__ import annotations

from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from alignlab.rollout.vllm.access import server_token

GENERATE = "/inference/v1/generate"
HOSTILE: dict[str, tuple[str, str, dict[str, str], Any, int]] = {
    "no token": ("GET", "/alignlab/about", {"Authorization": "Bearer "}, b"", 401),
    "no token, a large body": ("POST", GENERATE, {"Authorization": "x", "Content-Length": "1" * 15}, b"", 401),
    "a large body": ("POST", GENERATE, {"Content-Length": "1" * 15}, b"", 413),
    "no JSON": ("POST", GENERATE, {}, b"{", 400),
    "deep JSON": ("POST", GENERATE, {}, b"[" * 100_000, 400),
    "JSON of another type": ("POST", GENERATE, {}, b"[7]", 400),
    "a huge token": ("POST", GENERATE, {}, b'{"model": "policy", "token_ids": [1e99], "sampling_params": {}}', 400),
    "an upload in chunks": ("PUT", "/alignlab/weights/a-1-1", {"Transfer-Encoding": "chunked"}, b"0\r\n\r\n", 411),
    "an upload of any size": ("PUT", "/alignlab/weights/a-1-1", {"Content-Length": "1" * 15}, b"", 413),
    "an upload without a version": ("PUT", "/alignlab/weights/..", {}, b"x", 422),
    "an upload of a strange version": ("PUT", "/alignlab/weights/a-b", {}, b"x", 422),
    "an upload of something else": ("PUT", "/alignlab/weights/a-1-1", {}, b"x" * 100, 422),
    "no question about experts": ("POST", "/alignlab/routing", {}, b'{"name": 7}', 400),
    "experts of nobody": ("POST", "/alignlab/routing", {}, b'{"name": "a", "layers": [0]}', 404),
}


def ask(address: str, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str]:
    """Return (status, text) of a server's answer; the right token and length are sent unless `headers` have them."""
    place = urlsplit(address)
    sent = {"Authorization": f"Bearer {server_token()}", "Content-Type": "application/json"} | headers
    if not {"Content-Length", "Transfer-Encoding"} & headers.keys():
        sent["Content-Length"] = str(len(body))
    connection = HTTPConnection(place.hostname or "", place.port, timeout=60)
    connection.putrequest(method, path)
    for header, value in sent.items():
        connection.putheader(header, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text
