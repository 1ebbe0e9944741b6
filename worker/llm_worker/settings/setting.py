"""What both programs' settings have in common: a row of the table, and what a text may be.

The worker's settings are read in `worker`, those of the fleet's KV index in `fleet`; each
reports all its problems together. Here is what they must not tell differently. Reads no
environment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

PLANE_REPLAY_OFFSET = 100  # a ZMQ plane answers this far above the port that it publishes on
_PORTS = range(1, 65536)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a program: a row of its ``--help`` and of the README."""

    name: str  # "system-port"
    default: str
    meaning: str

    flag_prefix: ClassVar[str] = "--"
    env_prefix: ClassVar[str] = ""

    @property
    def flag(self) -> str:
        """The command-line spelling."""
        return self.flag_prefix + self.name

    @property
    def env(self) -> str:
        """The environment spelling."""
        return self.env_prefix + self.name.upper().replace("-", "_")


def help_rows(settings: Sequence[Setting]) -> list[str]:
    """The table of settings."""
    width = max(len(setting.flag) for setting in settings)
    return [
        f"  {setting.flag:<{width}}  {setting.meaning}"
        + (f" [{setting.default}]" if setting.default else "")
        for setting in settings
    ]


def host(text: str) -> str:
    """A host name or an address, without the brackets of IPv6.

    Raises:
        ValueError: it is neither.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.:\[\]%-]+", text):
        raise ValueError(f"{text!r} is not a host name or an address")
    return text.strip("[]")


def port(text: str) -> int:
    """A port.

    Raises:
        ValueError: it is none.
    """
    if not text.isdecimal() or int(text) not in _PORTS:
        raise ValueError(f"{text!r} is not a port; use 1 to 65535")
    return int(text)


def count(text: str) -> int | None:
    """A number from 1; nothing is None.

    Raises:
        ValueError: it is neither.
    """
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a number above 0")
    return int(text)


def choice(text: str, choices: Sequence[str]) -> str:
    """One of ``choices``.

    Raises:
        ValueError: it is none of them.
    """
    if text not in choices:
        raise ValueError(f"{text!r} is unknown; choose {' or '.join(choices)}")
    return text
