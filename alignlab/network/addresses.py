"""Addresses of servers: secrets in them, and whether they belong to this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

HIDDEN = "***"
"""Shown in place of a secret."""
_USER = re.compile(r"(?<=//)[^/?#]*@")
_QUERY = re.compile(r"[?#].*", re.DOTALL)


def redacted(url: str) -> str:
    """Return an address as messages may show it: without a user's name, password, query and fragment."""
    return _QUERY.sub(f"?{HIDDEN}", _USER.sub(f"{HIDDEN}@", url))


def secret_part(url: str) -> str | None:
    """Return the name of a part of an address that may hold a secret and must be empty; None if there is none."""
    split = urlsplit(url)
    if "@" in split.netloc:
        return "user name or key before the @"
    if split.query or "?" in url:
        return "query (what follows the ?)"
    return "fragment (what follows the #)" if "#" in url else None


def is_loopback(host: str) -> bool:
    """Return True for a name or number of this machine's loopback interface: localhost, 127.x.x.x, ::1.

    No name is looked up. 0.0.0.0 and ::, which mean "any", are no loopback: a server there listens on all interfaces.
    """
    address = _number(host)
    return _is_local_name(host) if address is None else address.is_loopback


def leads_to_loopback(host: str) -> bool:
    """Return True if a connection to `host` stays on this machine, as one to "any" does; a name is looked up."""
    address = _number(host)
    if address is not None:
        return address.is_loopback or address.is_unspecified
    if _is_local_name(host):
        return True
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    numbers = [_number(address) for address in addresses]
    return bool(numbers) and all(number is not None and number.is_loopback for number in numbers)


def listens_beyond(host: str) -> bool:
    """Return True if a server that listens at `host` can be reached from other machines, as at "any"."""
    return not is_loopback(host) and (_number(host) is not None or not leads_to_loopback(host))


def must_bypass_proxies(host: str) -> bool:
    """Return True if proxies are set in the environment and `host` is this machine, which no proxy must serve."""
    return bool(getproxies()) and leads_to_loopback(host)


def _is_local_name(host: str) -> bool:
    name = host.rstrip(".").lower()
    return name == "localhost" or name.endswith(".localhost")


def _number(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that `host` spells, also in short forms (127.1, 0x7f000001); None for a name."""
    host = host.strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"[0-9a-fA-FxX.]+", host):
            return None
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))
        except OSError:
            return None
    return getattr(address, "ipv4_mapped", None) or address
