"""The Grafana unit ids in use. A misspelt id is shown as a suffix, silently; this list is why not.

Source: grafana/grafana, packages/grafana-data/src/valueFormats/categories.ts.
"""

from __future__ import annotations

SHORT = "short"
NONE = "none"
RATIO = "percentunit"
SECONDS = "s"
BYTES = "bytes"
REQUESTS_PER_SECOND = "reqps"
PER_SECOND = "ops"
TIME_AGO = "dateTimeFromNow"
CORES = "suffix: cores"
TOKENS_PER_SECOND = "count:tok/s"
TOKENS = "count:tok"
STEPS_PER_SECOND = "count:steps/s"
SAMPLES_PER_SECOND = "count:samples/s"

KNOWN = frozenset(
    {
        SHORT,
        NONE,
        RATIO,
        SECONDS,
        BYTES,
        REQUESTS_PER_SECOND,
        PER_SECOND,
        TIME_AGO,
        CORES,
        TOKENS_PER_SECOND,
        TOKENS,
        STEPS_PER_SECOND,
        SAMPLES_PER_SECOND,
    }
)
