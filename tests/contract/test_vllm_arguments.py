"""vLLM's own parser and what the worker judges of what it understood."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from llm_worker.settings.vllm_arguments import DEFAULT_PORT, problems

pytestmark = pytest.mark.needs("vllm")


def parsed(*arguments: str) -> Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    namespace: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(list(arguments))
    return namespace


def test_what_vllm_does_by_default_is_no_problem() -> None:
    """Nor is one API server, said out loud."""
    assert parsed("--model=m").port == DEFAULT_PORT
    assert problems(parsed("--model=m")) == []
    assert problems(parsed("--model=m", "--api-server-count=1")) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--headles"], "--headless"),
        (["--grpc"], "--grpc"),
        (["--api-server", "3"], "--api-server-count 3"),
        (["-asc", "3"], "--api-server-count 3"),
        (["--shutdown-timeout", "60"], "--worker-drain-seconds"),
    ],
)
def test_what_the_worker_cannot_do_is_named_however_it_is_written(
    arguments: list[str], named: str
) -> None:
    """Abbreviations and short options are vLLM's to understand."""
    (problem,) = problems(parsed("--model=m", *arguments))
    assert named in problem


def test_what_the_worker_cannot_do_is_found_in_a_file(tmp_path: Path) -> None:
    """vLLM reads its options from YAML, too."""
    file = tmp_path / "vllm.yaml"
    file.write_text("model: m\nheadless: true\napi-server-count: 4\n", encoding="utf-8")
    found = problems(parsed("serve", "--config", str(file)))
    assert [problem.split(" ")[0] for problem in found] == ["--headless", "--api-server-count"]
