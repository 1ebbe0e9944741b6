"""What comes before the engine: its environment, its arguments, its port.

Source: vllm/entrypoints/launchers/api_server/entry.py and launcher.py, 0.32.0.
"""

from __future__ import annotations

import json
import os
import socket
from argparse import Namespace
from pathlib import Path

from llm_worker import __version__
from llm_worker.errors import EXIT_CONFIG, EXIT_STOPPED, ConfigError
from llm_worker.serving import tiny
from llm_worker.settings import vllm_arguments
from llm_worker.settings.worker import TINY, Config, cache_directory

TINY_KV_CACHE_BYTES = 256 * 2**20


def prepare_environment() -> None:
    """Set what vLLM reads from the environment and what a worker needs otherwise than a shell.

    Called before vLLM is imported. What the user has set is left alone, but for the reaction to a
    dead engine: vLLM would stop the API server by itself and exit with code 0.
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] = "1"
    os.environ["LLM_WORKER_PARENT_PID"] = str(os.getpid())


def parse_arguments(config: Config) -> Namespace:
    """vLLM's arguments through vLLM's own parser.

    Raises:
        ConfigError: vLLM refuses them; its message is on standard error already.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="llm_worker"))
    try:
        args = parser.parse_args([*_defaults(config), *config.engine_args])
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
    except SystemExit as error:
        if error.code in (0, None):  # --help, --version
            raise
        raise ConfigError(["vLLM refused its arguments (see above)"]) from error
    except (TypeError, ValueError) as error:
        raise ConfigError([f"vLLM refused its arguments: {error}"]) from error
    problems = vllm_arguments.problems(args)
    if args.model_tag is not None:
        fix = f"give --model {args.model_tag}, or the model before all options"
        problems.append(f"{args.model_tag!r} stands among the options: {fix}")
    if problems:
        raise ConfigError(problems)
    namespace: Namespace = args
    return namespace


def explain(arguments: list[str]) -> int:
    """Print what was asked of vLLM's own options, or the versions; return the exit code."""
    if "--version" in arguments:
        import vllm

        print(f"llm_worker {__version__}, vLLM {vllm.__version__}")
        return EXIT_STOPPED
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="llm_worker"))
    try:
        parser.parse_args(arguments)
    except SystemExit as error:
        return EXIT_CONFIG if error.code else EXIT_STOPPED
    return EXIT_STOPPED


def _defaults(config: Config) -> list[str]:
    """Arguments that come before the user's, so that the user's win."""
    defaults: list[str] = []
    if config.log_format == "json":
        defaults += ["--logging-config.formatter", "json"]
    if config.kv_events is not None:
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{config.kv_events.port}",
            "replay_endpoint": f"tcp://*:{config.kv_events.replay_port}",
        }
        defaults += ["--kv-events-config", json.dumps(events)]
    if config.model == TINY and not Path(TINY).exists():
        model = tiny.make(cache_directory() / tiny.directory_name())
        defaults += ["--model", str(model), "--load-format", "dummy", "--served-model-name", TINY]
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            defaults += ["--kv-cache-memory-bytes", str(TINY_KV_CACHE_BYTES)]
    elif config.model is not None:
        defaults += ["--model", config.model]
    return defaults


def bind_api(args: Namespace) -> socket.socket:
    """Bind vLLM's API port before the model loads, so that a busy one fails at once.

    Raises:
        ConfigError: it cannot be bound.
    """
    from vllm.entrypoints.launchers.launcher import setup_server

    try:
        listener: socket.socket
        _, listener = setup_server(args, reuse_port=False)
    except OSError as error:
        where = args.uds or f"{args.host or '0.0.0.0'}:{args.port}"  # noqa: S104 - a message
        raise ConfigError(
            [
                f"the API cannot listen on {where} ({error.strerror or error}): "
                "choose another --port, or stop what holds it"
            ]
        ) from error
    except KeyError as error:
        raise ConfigError([f"vLLM refused its arguments: {error.args[0]}"]) from error
    return listener
