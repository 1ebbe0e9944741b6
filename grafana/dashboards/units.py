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
EVENTS_PER_SECOND = "count:events/s"
BATCHES_PER_SECOND = "count:batches/s"
BLOCKS_PER_SECOND = "count:blocks/s"

# Written out, so that a slip in a name above is found: Grafana's ids, and its "count:" and
# "suffix:" for units that it does not have.
KNOWN = frozenset(
    {"short", "none", "percentunit", "s", "bytes", "reqps", "ops", "dateTimeFromNow"}
    | {"suffix: cores", "count:tok/s", "count:tok", "count:steps/s", "count:samples/s"}
    | {"count:events/s", "count:batches/s", "count:blocks/s"}
)
