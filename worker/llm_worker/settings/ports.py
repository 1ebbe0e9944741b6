"""Which of the worker's listeners would want the same port. Opens none."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from llm_worker.settings import setting


@dataclass(frozen=True, slots=True)
class Listener:
    """Ports next to each other at one address; the first is 0 where any free one will do."""

    what: str  # "the API (--port)"
    host: str  # "" and "*" are every IPv4 address
    first: int
    count: int = 1  # one for each rank

    @property
    def last(self) -> int:
        """The highest of its ports."""
        return self.first + self.count - 1


def problems(listeners: Sequence[Listener]) -> list[str]:
    """What cannot be: a port above the last there is, or two listeners on one port."""
    fixed = [listener for listener in listeners if listener.first]
    found = [
        f"{listener.what}: port {listener.last} is above {setting.PORTS[-1]}"
        for listener in fixed
        if listener.last not in setting.PORTS
    ]
    for one, other in itertools.combinations(fixed, 2):
        port = max(one.first, other.first)
        if port <= min(one.last, other.last) and _meet(one.host, other.host):
            found.append(f"port {port} is asked for by {one.what} and by {other.what}")
    return found


def _meet(one: str, other: str) -> bool:
    """Whether two hosts certainly, or as names usually do, stand for a common address."""
    if one == other or "::" in (one, other):  # every address, of IPv4 as well
        return True
    if _is_every_ipv4(one) or _is_every_ipv4(other):
        return ":" not in one + other
    if "localhost" in (one, other):
        return all(map(setting.is_loopback, (one, other)))
    return False


def _is_every_ipv4(host: str) -> bool:
    if host in ("", "*"):
        return True
    try:
        return ipaddress.ip_address(host) == ipaddress.IPv4Address(0)
    except ValueError:
        return False
