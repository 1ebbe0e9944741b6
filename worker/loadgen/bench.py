"""One phase of load with ``vllm bench serve``, in a process of its own.

Importing vLLM's benchmark takes seconds, so a fork server imports it once (``PRELOAD``) and every
phase is a fork of that. A phase can therefore be killed at any moment, and takes nothing with it.
Source: vllm/benchmarks/serve.py, 0.32.0.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence

PRELOAD = ("loadgen.bench", "vllm.benchmarks.serve")


def run(name: str, arguments: Sequence[str]) -> None:
    """Run one phase and print one line about it, instead of the benchmark's tables."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    with contextlib.redirect_stdout(io.StringIO()):
        result = main(parser.parse_args(list(arguments)))
    summary = {
        "phase": name,
        "seconds": round(result["duration"], 1),
        "completed": result["completed"],
        "failed": result["failed"],
        "output_tokens_per_second": round(result["output_throughput"]),
        "ttft_p99_ms": round(result["p99_ttft_ms"]),
    }
    print(json.dumps(summary), flush=True)
