"""What the load consists of: the phases of a cycle, as arguments of ``vllm bench serve``.

Sized for the demo worker (two layers on a CPU, a KV cache of some thousand tokens): lulls leave it
nearly idle, bursts fill its batch, and now and then a crunch asks for more than its cache holds, so
that requests are preempted. Crunches are rare, or the alert about preemptions would rightly fire
for as long as the demo runs. Pure: no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

# A phase that takes longer than this is stuck: the worker hangs or is far too slow for the load.
PHASE_LIMIT_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of traffic."""

    name: str
    arguments: tuple[str, ...]  # of `vllm bench serve`, without address and model
    backend: str = "openai"
    endpoint: str = "/v1/completions"


def _random(input_tokens: int, output_tokens: int) -> tuple[str, ...]:
    """Prompts without a common prefix; lengths vary by half around the given ones."""
    return (
        "--dataset-name=random",
        f"--random-input-len={input_tokens}",
        f"--random-output-len={output_tokens}",
        "--random-range-ratio=0.5",
    )


def _shared_prefixes(prefixes: int, prefix_tokens: int, output_tokens: int) -> tuple[str, ...]:
    """Prompts that begin alike, as with a system prompt: the prefix cache serves most of each."""
    return (
        "--dataset-name=prefix_repetition",
        f"--prefix-repetition-num-prefixes={prefixes}",
        f"--prefix-repetition-prefix-len={prefix_tokens}",
        "--prefix-repetition-suffix-len=48",
        f"--prefix-repetition-output-len={output_tokens}",
    )


def _rate(requests: int, per_second: str, *, burstiness: float, at_once: int) -> tuple[str, ...]:
    """Arrivals; a burstiness of 1 is a Poisson process, lower comes in clusters."""
    return (
        f"--num-prompts={requests}",
        f"--request-rate={per_second}",
        f"--burstiness={burstiness}",
        f"--max-concurrency={at_once}",
    )


CONVERSATIONS = Phase(
    "conversations",
    (
        *_shared_prefixes(prefixes=6, prefix_tokens=384, output_tokens=64),
        *_rate(72, "6", burstiness=1.0, at_once=16),
    ),
)
LULL = Phase("lull", (*_random(64, 24), *_rate(8, "1", burstiness=0.5, at_once=4)))
BURST = Phase("burst", (*_random(96, 96), *_rate(320, "inf", burstiness=1.0, at_once=56)))
CRUNCH = Phase(
    "crunch",
    (*_random(320, 384), *_rate(240, "inf", burstiness=1.0, at_once=64), "--ignore-eos"),
)
CHAT = Phase(
    "chat",
    (*_random(96, 80), *_rate(40, "4", burstiness=0.3, at_once=8)),
    backend="openai-chat",
    endpoint="/v1/chat/completions",
)
CRUNCH_EVERY_CYCLES = 12  # about ten minutes


def phases(cycle: int) -> tuple[Phase, ...]:
    """The phases of one cycle, counted from 0; the first one shows everything."""
    peak = CRUNCH if cycle % CRUNCH_EVERY_CYCLES == 0 else BURST
    return (CONVERSATIONS, LULL, peak, CHAT)


def bench_arguments(phase: Phase, *, api: str, model: str, tokenizer: str, seed: int) -> list[str]:
    """The whole command line of one phase.

    The seed changes from cycle to cycle: the same prompts again would all be prefix-cache hits.
    """
    return [
        f"--backend={phase.backend}",
        f"--endpoint={phase.endpoint}",
        f"--base-url={api}",
        f"--model={model}",
        f"--tokenizer={tokenizer}",
        f"--seed={seed}",
        "--ready-check-timeout-sec=0",
        "--disable-tqdm",
        *phase.arguments,
    ]
