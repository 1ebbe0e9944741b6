"""The rows about what goes wrong: failed requests, and the process behind them."""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    GREEN,
    NO_TRAFFIC,
    RED,
    YELLOW,
    Reading,
    color_override,
    query,
    time_series,
)
from ..promql import (
    ENGINE_TARGET,
    MODEL,
    aggregate,
    mean,
    or_zero_named,
    rate,
    ratio,
)
from .vllm import (
    API_TARGET,
    FINISHED,
)

errors = Section(
    "Do requests fail?",
    [
        time_series(
            "Finished requests, by reason",
            Reading(
                "请求成功率. Finished requests per second: stop (the model ended), length (cut at "
                "max_tokens), abort (ended by the engine), error, repetition.",
                "How answers end.",
                "Mostly stop. abort and error at 0.",
                "A client that disconnects is counted nowhere by vLLM, abort stays 0; the worker "
                "dashboard's ledger has it.",
            ),
            [query(rate(FINISHED, by=("finished_reason",)), "{{finished_reason}}")],
            units.REQUESTS_PER_SECOND,
            stack=True,
            overrides=[color_override("error", RED), color_override("stop", GREEN)],
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "HTTP answers, by status",
            Reading(
                "Answers of the API per second, by status class. Aborted streams count as 2xx.",
                "Includes what never reached the engine: bad requests, refusals.",
                "2xx; some 4xx from callers' mistakes.",
                "5xx: read the server's log. Much 4xx: a caller is broken.",
            ),
            [query(rate("http_requests_total", by=("status",), scope=API_TARGET), "{{status}}")],
            units.REQUESTS_PER_SECOND,
            stack=True,
            overrides=[color_override("5xx", RED), color_override("2xx", GREEN)],
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Failure and truncation shares",
            Reading(
                "Of finished requests: share that ended by error, and share that was cut at "
                "max_tokens.",
                "A truncated answer is a failure to its reader.",
                "error 0 %; length steady.",
                "error above 1 %: a critical alert fires, read the log. length jumps: callers "
                "lowered max_tokens, or the model talks too long.",
            ),
            [
                query(ratio(rate(FINISHED, 'finished_reason="error"'), rate(FINISHED)), "error"),
                query(ratio(rate(FINISHED, 'finished_reason="length"'), rate(FINISHED)), "length"),
            ],
            units.RATIO,
            maximum=1,
            overrides=[color_override("error", RED)],
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Admission rejections",
            Reading(
                "Requests per second that were refused because the queue was at its limit.",
                "Refusing early is better than letting everybody wait; but it is refusing.",
                "0. Without `--max-num-queued-reqs` or `--max-num-queued-tokens` nothing is ever "
                "refused.",
                "Above 0 for minutes: add replicas; callers should back off on 503.",
            ),
            [
                query(
                    or_zero_named(
                        rate("vllm:admission_rejections_total", by=("reason",), scope=MODEL),
                        "reason",
                        "none",
                    ),
                    "{{reason}}",
                )
            ],
            units.REQUESTS_PER_SECOND,
        ),
        time_series(
            "HTTP duration, by handler",
            Reading(
                "Mean time until the API has answered, per route; a stream ends with its last "
                "token.",
                "Separates slow generation from slow helpers such as tokenize.",
                "Close to end-to-end latency for completions, milliseconds for the rest.",
                "Far above end-to-end latency: the API process itself is the bottleneck; look at "
                "its CPU.",
            ),
            [
                query(
                    mean("http_request_duration_seconds", by=("handler",), scope=API_TARGET),
                    "{{handler}}",
                )
            ],
            units.SECONDS,
            size=(16, 8),
            no_value=NO_TRAFFIC,
        ),
    ],
)

process = Section(
    "Is the server process healthy?",
    [
        time_series(
            "Memory",
            Reading(
                "内存使用情况. Resident memory of the API process; the engine's own processes and "
                "the GPU are not in it.",
                "A leak here ends in a restart by the kernel.",
                "Flat after the first minutes of load.",
                "Climbs for hours: plan a restart and look at request logging and at huge prompts.",
            ),
            [
                query(
                    aggregate(
                        "max",
                        "process_resident_memory_bytes",
                        by=("instance",),
                        scope=ENGINE_TARGET,
                    ),
                    "{{instance}} resident",
                ),
                query(
                    aggregate(
                        "max", "process_virtual_memory_bytes", by=("instance",), scope=ENGINE_TARGET
                    ),
                    "{{instance}} virtual",
                ),
            ],
            units.BYTES,
            overrides=[
                {
                    "matcher": {"id": "byRegexp", "options": ".* virtual"},
                    "properties": [
                        {
                            "id": "custom.hideFrom",
                            "value": {"legend": False, "tooltip": False, "viz": True},
                        }
                    ],
                }
            ],
        ),
        time_series(
            "CPU",
            Reading(
                "Python进程指标. CPU that the API process uses, in cores.",
                "It is one event loop: near one core it delays every stream.",
                "Below 0.7 cores.",
                "Near 1: start more API servers with `--api-server-count`.",
            ),
            [
                query(
                    rate("process_cpu_seconds_total", by=("instance",), scope=ENGINE_TARGET),
                    "{{instance}}",
                )
            ],
            units.CORES,
            steps=((GREEN, None), (YELLOW, 0.7), (RED, 0.95)),
            show_thresholds=True,
        ),
        time_series(
            "Open files",
            Reading(
                "Share of the allowed file descriptors that are open; each connection is one.",
                "At 100 % no new connection is accepted.",
                "Below 50 %.",
                "Above 80 %: raise `ulimit -n`, and look for clients that never close.",
            ),
            [
                query(
                    f"{aggregate('max', 'process_open_fds', by=('instance',), scope=ENGINE_TARGET)}"
                    " / "
                    f"{aggregate('max', 'process_max_fds', by=('instance',), scope=ENGINE_TARGET)}",
                    "{{instance}}",
                )
            ],
            units.RATIO,
            maximum=1,
            steps=((GREEN, None), (YELLOW, 0.5), (RED, 0.8)),
            show_thresholds=True,
        ),
        time_series(
            "Garbage collections",
            Reading(
                "Python's collections per second, by generation. Generation 2 walks everything and "
                "stops all streams meanwhile.",
                "Long full collections are stutter that no other panel explains.",
                "Generation 2 close to 0: vLLM freezes its heap after start-up.",
                "Steady generation 2 and a high inter-token p99: whoever hosts the engine does not "
                "freeze the heap.",
            ),
            [
                query(
                    rate(
                        "python_gc_collections_total",
                        by=("instance", "generation"),
                        scope=ENGINE_TARGET,
                    ),
                    "{{instance}} generation {{generation}}",
                )
            ],
            units.PER_SECOND,
        ),
        time_series(
            "Uptime",
            Reading(
                "Time since the server process started.",
                "A saw-tooth is a crash loop, even if every life looks healthy.",
                "A straight line upwards.",
                "Saw-tooth: read why it ended; the worker dashboard tells the last reason.",
            ),
            [
                query(
                    "time() - "
                    + aggregate(
                        "max", "process_start_time_seconds", by=("instance",), scope=ENGINE_TARGET
                    ),
                    "{{instance}}",
                )
            ],
            units.SECONDS,
        ),
        time_series(
            "Scrape duration",
            Reading(
                "How long /metrics takes to answer. vLLM renders it on the loop that serves.",
                "A slow answer means a busy server, or too many series.",
                "Below 100 ms; the time-out is 8 s.",
                "Seconds: the event loop is blocked; compare with CPU and inter-token latency.",
            ),
            [
                query(
                    aggregate(
                        "max", "scrape_duration_seconds", by=("instance",), scope=ENGINE_TARGET
                    ),
                    "{{instance}}",
                )
            ],
            units.SECONDS,
        ),
    ],
)
