"""What both programs' settings have in common: rows with their parsers, and their one reader.

A setting is a row of a table: its flag, its variable, its default, what it means and what its text
may be. The reader turns a table, a command line and an environment into values; a flag wins over
its variable. Every problem is collected, each names flag, variable and fix. What is no setting at
all in the environment is a warning, as others write there, too: Kubernetes does for every Service.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

PORTS = range(1, 65536)
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

# What Kubernetes puts into every container for a Service, after the Service's name. A name that
# only ends in PORT may be a setting's as well: then the value tells, see `_KUBERNETES_VALUE`.
# Source: kubernetes/pkg/kubelet/envvars/envvars.go.
_KUBERNETES_NAME = re.compile(
    r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_KUBERNETES_VALUE = re.compile(r"(tcp|udp|sctp)://.*")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a program: a row of its ``--help`` and of the documents."""

    name: str  # "system-port"
    default: str  # as one would write it
    meaning: str
    parse: Callable[[str], Any]  # text to value; raises ValueError, which says what it may be
    repeated: bool = False  # a flag for each value; in the variable with spaces between
    inherits: str = ""  # a variable of somebody else's that counts when ours says nothing

    flag_prefix: ClassVar[str] = "--"
    env_prefix: ClassVar[str] = ""

    @property
    def flag(self) -> str:
        """The command-line spelling."""
        return self.flag_prefix + self.name

    @property
    def field(self) -> str:
        """The name of its value."""
        return self.name.replace("-", "_") + ("s" if self.repeated else "")

    @property
    def env(self) -> str:
        """The environment spelling."""
        return self.env_prefix + self.field.upper()


class Reader:
    """What a command line and an environment say about the settings of one program."""

    def __init__(
        self,
        settings: Sequence[Setting],
        arguments: Iterable[str],
        environment: Mapping[str, str],
        *,
        commands: Iterable[str],
        not_ours: frozenset[str] = frozenset(),
    ) -> None:
        """Read everything; nothing is raised.

        ``commands`` are flags that are no settings; one that takes a value has that value's name
        behind it. ``not_ours`` are flags and variables that only look as if they were.
        """
        self.values: dict[str, Any] = {}  # by `Setting.field`; of a bad text: the default's
        self.commands: dict[str, str] = {}  # those that were given → value
        self.rest: list[str] = []  # arguments that are not ours, in order
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.bad: set[str] = set()  # fields whose text had a problem
        self._settings = {setting.field: setting for setting in settings}
        self._environment = environment
        given = self._split(arguments, dict(map(_flag_and_value, commands)), not_ours)
        self._look_at_environment(not_ours)
        for setting in settings:
            texts = given.get(setting.field) or self._from_environment(setting)
            self.values[setting.field] = self._parsed(setting, texts)

    def problem(self, field: str, what: str) -> None:
        """Something is wrong with one setting."""
        setting = self._settings[field]
        self.problems.append(f"{setting.flag} ({setting.env}): {what}")

    def _split(
        self, arguments: Iterable[str], commands: Mapping[str, str], not_ours: frozenset[str]
    ) -> dict[str, list[str]]:
        """The texts of our flags, by field; commands and the rest go to their places."""
        by_flag = {setting.flag: setting for setting in self._settings.values()}
        (prefix,) = {setting.flag_prefix for setting in by_flag.values()}
        given: dict[str, list[str]] = {}
        left = list(arguments)
        while left:
            argument = left.pop(0)
            written, equals, value = argument.partition("=")
            flag = written.replace("_", "-")
            known = flag in by_flag or flag in commands
            if not known and (flag in not_ours or not flag.startswith(prefix)):
                self.rest.append(argument)
            elif not known:
                self.problems.append(f"unknown option {written}{_did_you_mean(flag, by_flag)}")
                if not equals and left and not left[0].startswith("-"):
                    left.pop(0)  # most likely its value
            elif commands.get(flag) == "":
                self.commands[flag] = ""
            else:
                if not equals and left and not left[0].startswith("--"):
                    value = left.pop(0)
                if not value:
                    self.problems.append(f"{written} needs a value")
                elif flag in commands:
                    self.commands[flag] = value
                elif by_flag[flag].repeated:
                    given.setdefault(by_flag[flag].field, []).append(value)
                else:
                    given[by_flag[flag].field] = [value]
        return given

    def _look_at_environment(self, not_ours: frozenset[str]) -> None:
        """Warn of what begins like our variables and is none."""
        known = {setting.env for setting in self._settings.values()}
        (prefix,) = {setting.env_prefix for setting in self._settings.values()}
        for name, value in self._environment.items():
            if not name.startswith(prefix) or name in not_ours:
                continue
            kubernetes = _is_kubernetes_port(name, value)
            if kubernetes and name in known:
                self.warnings.append(
                    f"{name}={value} was written by Kubernetes for a Service of that name and is "
                    "ignored: set the variable in the Pod, rename the Service, or set "
                    "enableServiceLinks: false"
                )
            elif not (
                kubernetes or name in known or _KUBERNETES_NAME.fullmatch(name.removeprefix(prefix))
            ):
                self.warnings.append(
                    f"unknown environment variable {name} is ignored{_did_you_mean(name, known)}"
                )

    def _from_environment(self, setting: Setting) -> list[str]:
        text = self._environment.get(setting.env, "")
        if _is_kubernetes_port(setting.env, text):
            text = ""
        if not text and setting.inherits:
            text = self._environment.get(setting.inherits, "")
        if setting.repeated:
            return text.split()
        return [text] if text else []

    def _parsed(self, setting: Setting, texts: Sequence[str]) -> Any:
        values: list[Any] = []
        for text in texts:
            try:
                values.append(setting.parse(text))
            except ValueError as error:
                self.bad.add(setting.field)
                self.problem(setting.field, str(error))
        if setting.repeated:
            return tuple(dict.fromkeys(values))
        return values[0] if values else setting.parse(setting.default)


def help_text(usage: str, settings: Sequence[Setting], commands: Mapping[str, str]) -> str:
    """What ``--help`` prints: usage, the table of settings, the commands and their meanings."""
    rows = [
        (setting.flag, f"{setting.meaning} [{setting.default}]".removesuffix(" []"))
        for setting in settings
    ]
    width = max(len(flag) for flag in (*commands, *(flag for flag, _ in rows)))

    def table(lines: Iterable[tuple[str, str]]) -> str:
        return "".join(f"  {flag:<{width}}  {meaning}\n" for flag, meaning in lines)

    return f"{usage}\n{table(rows)}\n{table(commands.items())}\n"


def optional(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """A parser to which nothing is None."""
    return lambda text: parse(text) if text else None


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
    if not _is_number(text) or int(text) not in PORTS:
        raise ValueError(f"{text!r} is not a port; use 1 to {PORTS[-1]}")
    return int(text)


def port_or_zero(text: str) -> int:
    """A port, or 0 for any free one.

    Raises:
        ValueError: it is neither.
    """
    return 0 if _is_number(text) and int(text) == 0 else port(text)


def count(text: str) -> int:
    """A number from 1.

    Raises:
        ValueError: it is none.
    """
    if not _is_number(text) or int(text) < 1:
        raise ValueError(f"{text!r} is not a number above 0")
    return int(text)


def choice(*choices: str) -> Callable[[str], str]:
    """A parser of one of ``choices``."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is unknown; choose {' or '.join(choices)}")
        return text

    return parse


def seconds(text: str) -> float:
    """A time in seconds, 0 or more.

    Raises:
        ValueError: it is none.
    """
    value = _seconds(text)
    if not value >= 0:
        raise ValueError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def seconds_above_zero(text: str) -> float:
    """A time in seconds above 0.

    Raises:
        ValueError: it is none.
    """
    value = _seconds(text)
    if not value > 0:
        raise ValueError(f"{text!r} is not a number of seconds above 0")
    return value


def label(text: str) -> str:
    """The value of a metric's label.

    Raises:
        ValueError: it is too long, or cannot be read on a page.
    """
    if len(text) > 128 or not text.isprintable():
        raise ValueError("use up to 128 printable characters")
    return text


def name(text: str) -> str:
    """A name that topics and addresses can carry.

    Raises:
        ValueError: it is too long, or has other characters.
    """
    if not re.fullmatch(r"[!-~]{1,128}", text):
        raise ValueError("use up to 128 printable ASCII characters, no spaces")
    return text


def token_file(text: str) -> Path:
    """A file that holds a bearer token.

    Raises:
        ValueError: it cannot be read, or no request could carry what it holds.
    """
    path = Path(text)
    try:
        content = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not content:
        raise ValueError(f"{path} is empty; put the token into it")
    if not re.fullmatch(r"[!-~]+", content):
        raise ValueError(
            f"the token in {path} has a character that an HTTP header cannot carry: use printable "
            "ASCII characters, no spaces"
        )
    return path


def directory(text: str) -> Path:
    """A directory that can be written to; made when it is not there.

    Raises:
        ValueError: it cannot be.
    """
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error}") from error
    return path


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _flag_and_value(command: str) -> tuple[str, str]:
    """``--to FILE`` → ``--to`` and ``FILE``."""
    flag, _, value = command.partition(" ")
    return flag, value


def _seconds(text: str) -> float:
    """Not a number where it is none, or where it has no end."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def _is_kubernetes_port(name: str, value: str) -> bool:
    """Whether it is ``SERVICE_PORT=tcp://10.0.0.1:8081``, which nobody writes into a setting."""
    return name.endswith("_PORT") and _KUBERNETES_VALUE.fullmatch(value) is not None


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]}?" if close else f": choose from {', '.join(known)}"
