"""Prints pip's settings as shell exports for uv, which reads neither pip.conf nor PIP_*.

What is already set for uv wins. uv asks only the first index that knows a package; pip asks all of
them, and so does uv here, so that a lock resolves alike with both.
"""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys

# pip's option -> (uv's variable, what separates several values there)
NAMES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}


def pip_settings(listing: str) -> dict[str, str]:
    """The options in the output of ``pip config list``; the environment's win over the files'."""
    values: dict[str, str] = {}
    from_environment: dict[str, str] = {}
    for line in listing.splitlines():
        name, equals, literal = line.partition("=")
        if not equals:
            continue
        section, _, option = name.rpartition(".")
        target = from_environment if section == ":env:" else values
        target[option] = str(ast.literal_eval(literal))
    return values | from_environment


def uv_settings(pip: dict[str, str]) -> dict[str, str]:
    """uv's variables for pip's options."""
    settings = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for option, (variable, separator) in NAMES.items():
        if option in pip:
            settings[variable] = separator.join(pip[option].split())
    return settings


def main() -> None:
    """Print one export per line."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    for variable, value in uv_settings(pip_settings(listing)).items():
        if variable not in os.environ:
            print(f"export {variable}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
