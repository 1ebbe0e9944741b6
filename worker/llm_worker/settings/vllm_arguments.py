"""What is looked at, never changed, in vLLM's own arguments.

They pass through verbatim, so there is no second list of vLLM's options here: only the few that
collide with the worker's. Read early, as text, they say only what is spelled out on the command
line; `problems` judges what vLLM's own parser made of them, abbreviations and YAML files included.
Imports no vLLM. Source: vllm/entrypoints/launchers/cli_args.py, 0.32.0.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence

# vLLM's own options that begin like ours.
THEIRS = frozenset({"--worker-cls", "--worker-extension-cls"})
DEFAULT_PORT = 8000
# Options that make no sense with one engine behind one in-process API server.
UNSUPPORTED = {
    "headless": "the worker always serves; start headless nodes with `vllm serve --headless`",
    "grpc": "the worker serves HTTP; vLLM's gRPC server needs `vllm serve --grpc`",
}


def option(theirs: Sequence[str], *flags: str) -> str | None:
    """The last value of one of vLLM's options; "" when it is given without one."""
    found: str | None = None
    for argument, following in zip(theirs, (*theirs[1:], ""), strict=False):
        flag, equals, value = argument.partition("=")
        if (flag.replace("_", "-") if flag.startswith("--") else flag) not in flags:
            continue
        found = value if equals else ("" if following.startswith("--") else following)
    return found


def number(theirs: Sequence[str], *flags: str, default: int, problems: list[str]) -> int:
    """The same of an option that is a number; what is none becomes a problem."""
    text = option(theirs, *flags)
    if text is None:
        return default
    if not text.isdecimal():
        problems.append(f"{flags[0]}: {text!r} is not a number")
        return default
    return int(text)


def take_model(theirs: Sequence[str], problems: list[str]) -> tuple[str | None, list[str]]:
    """The model, from --model or from the first word, and the arguments without it."""
    model: str | None = None
    rest: list[str] = []
    arguments = iter(theirs)
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if position == 0 and not argument.startswith("-"):
            model = argument
        elif flag == "--model":
            given = value if equals else next(arguments, "")
            if not given or given.startswith("--"):
                problems.append("--model needs a value")
            elif model is not None and model != given:
                problems.append(f"two models: {model!r} and {given!r}; give one")
            model = given
        else:
            rest.append(argument)
    return model, rest


def asks_for_help(theirs: Sequence[str]) -> bool:
    """Whether they only ask what vLLM's options are, or which vLLM it is."""
    return any(
        argument in ("-h", "--help", "--version") or argument.startswith("--help=")
        for argument in theirs
    )


def spelled_out_problems(theirs: Sequence[str]) -> list[str]:
    """What can be told before vLLM is there: each option that is spelled out and cannot be."""
    servers = option(theirs, "--api-server-count", "-asc")
    return _unsupported(
        {
            "headless": option(theirs, "--headless") is not None,
            "grpc": option(theirs, "--grpc") is not None,
            "api_server_count": None if servers == "1" else servers,
        }
    )


def problems(namespace: Namespace) -> list[str]:
    """What vLLM's parser understood and the worker cannot do; each with its fix."""
    values = vars(namespace)
    found = _unsupported(values | {"api_server_count": _several(values.get("api_server_count"))})
    if values.get("shutdown_timeout"):
        found.append("--shutdown-timeout has no effect: use --worker-drain-seconds")
    return found


def _several(servers: int | None) -> int | None:
    return None if servers == 1 else servers


def _unsupported(values: Mapping[str, object]) -> list[str]:
    found = [
        f"--{name} is not supported: {reason}"
        for name, reason in UNSUPPORTED.items()
        if values.get(name)
    ]
    servers = values.get("api_server_count")
    if servers is not None:
        found.append(
            f"--api-server-count {servers}: the worker hosts one API server; run more workers"
        )
    return found
