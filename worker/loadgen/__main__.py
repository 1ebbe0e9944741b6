"""The load's life: wait until the worker is ready, run the cycle's phases, again and again.

Beside each phase run the impatient clients. A worker that goes away is waited for. SIGTERM ends
everything at once: nothing here is worth finishing.
Never imports vLLM itself: the fork server does, for `bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

from loadgen import bench, impatient
from loadgen.traffic import PHASE_LIMIT_SECONDS, Phase, bench_arguments, phases

log = logging.getLogger("loadgen")

READY_POLL_SECONDS = 1.0
AFTER_FAILURE_SECONDS = 5.0
# Mean pause between two clients who leave, and between two who ask too much.
LEAVE_EVERY_SECONDS = 2.5
TOO_MUCH_EVERY_SECONDS = 15.0
# Health: the longest time without a sign of life. A phase counts when it ends.
SIGN_OF_LIFE_SECONDS = PHASE_LIMIT_SECONDS + 60.0
# What a request to a worker that is starting, stopping or gone may end with.
UNREACHABLE = (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loadgen", description=__doc__)
    parser.add_argument("--api", default="http://127.0.0.1:8000", help="the OpenAI API")
    parser.add_argument("--system", default="http://127.0.0.1:8081", help="the system server")
    parser.add_argument("--model", default="tiny", help="the served model's name")
    parser.add_argument("--tokenizer", help="name or directory; default: the model's")
    parser.add_argument("--cycles", type=int, default=0, help="stop after so many; 0: never")
    parser.add_argument("--heartbeat", type=Path, help="file whose age tells that this lives")
    parser.add_argument("--check", action="store_true", help="exit 0 if the heartbeat is fresh")
    args = parser.parse_args()
    args.heartbeat = args.heartbeat or Path(tempfile.gettempdir()) / "loadgen.heartbeat"
    return args


def main() -> int:
    """Run the load until SIGTERM; with --check, tell whether another process does."""
    args = _arguments()
    if args.check:
        try:
            age = time.time() - args.heartbeat.stat().st_mtime
        except OSError:
            return 1
        return 0 if age < SIGN_OF_LIFE_SECONDS else 1
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s")
    return asyncio.run(_until_stopped(args))


async def _until_stopped(args: argparse.Namespace) -> int:
    load = asyncio.create_task(_load(args), name="load")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, load.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await load
    return 0


async def _load(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(bench.PRELOAD))
    tokenizer = args.tokenizer or _tokenizer(args.model)
    cycles = itertools.count() if args.cycles == 0 else range(args.cycles)
    seeds = itertools.count()  # never the same prompts again
    for cycle in cycles:
        for phase in phases(cycle):
            await _ready(args.system, args.heartbeat)
            arguments = bench_arguments(
                phase,
                api=args.api,
                model=args.model,
                tokenizer=tokenizer,
                seed=next(seeds),
            )
            others = [
                asyncio.create_task(_leaving(args.api, args.model), name="leaving"),
                asyncio.create_task(_asking_too_much(args.api, args.model), name="too-much"),
            ]
            try:
                await _run(context, phase, arguments)
            finally:
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)


def _tokenizer(model: str) -> str:
    """The directory of the tiny model's tokenizer, made here; other models go by their name."""
    if model != "tiny":
        return model
    from llm_worker.serving import tiny

    return str(tiny.make(Path(tempfile.gettempdir()) / "loadgen-tiny"))


async def _ready(system: str, heartbeat: Path) -> None:
    """Wait until the worker would serve a request."""
    waited = False
    while True:
        _alive(heartbeat)
        with contextlib.suppress(*UNREACHABLE):
            if await impatient.status_of(f"{system}/ready") == 200:
                if waited:
                    log.info("the worker is ready")
                return
        if not waited:
            log.info("waiting for %s/ready", system)
            waited = True
        await asyncio.sleep(READY_POLL_SECONDS)


def _alive(heartbeat: Path) -> None:
    heartbeat.touch()


async def _run(context: ForkServerContext, phase: Phase, arguments: list[str]) -> None:
    """Run one phase in a process; kill it when it is stuck or we are told to stop."""
    process = context.Process(target=bench.run, args=(phase.name, arguments), daemon=True)
    await asyncio.to_thread(process.start)  # the first start imports vLLM in the fork server
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(process.sentinel, ended.set)
    try:
        async with asyncio.timeout(PHASE_LIMIT_SECONDS):
            await ended.wait()
    except TimeoutError:
        log.warning("phase %s is stuck after %.0f s", phase.name, PHASE_LIMIT_SECONDS)
    finally:
        loop.remove_reader(process.sentinel)
        process.kill()
        process.join()
    if process.exitcode:
        log.warning("phase %s ended with exit code %s", phase.name, process.exitcode)
        await asyncio.sleep(AFTER_FAILURE_SECONDS)


async def _leaving(api: str, model: str) -> None:
    chance = random.Random()  # noqa: S311 - traffic, not secrets
    while True:
        await asyncio.sleep(chance.expovariate(1 / LEAVE_EVERY_SECONDS))
        with contextlib.suppress(*UNREACHABLE):
            await impatient.leave_midway(api, model, chance)


async def _asking_too_much(api: str, model: str) -> None:
    chance = random.Random()  # noqa: S311 - traffic, not secrets
    while True:
        await asyncio.sleep(chance.expovariate(1 / TOO_MUCH_EVERY_SECONDS))
        with contextlib.suppress(*UNREACHABLE):
            await impatient.ask_too_much(api, model)


if __name__ == "__main__":
    sys.exit(main())
