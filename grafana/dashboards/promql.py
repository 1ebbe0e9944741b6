"""PromQL building blocks: which series a panel may read, and the few shapes it reads them in.

Owns every selector. A selector always carries the dashboard's ``job`` and ``instance`` variables;
what cannot (alerts of Prometheus itself) is in ``needs.UNSCOPED`` with a reason. Families without a
model follow ``model_name`` by their server's.

Written for vLLM 0.32: counters end in ``_total``, ``le`` has Prometheus 3's form (``"1.0"``), and
a ratio divides sums, never averages ratios.
"""

from __future__ import annotations

WINDOW = "$__rate_interval"

# The jobs whose targets are engines; other jobs have process_* and up, too.
ENGINE_JOBS = 'job=~"worker|vllm.*"'

# Labels that every series of one target has.
TARGET = 'job=~"$job",instance=~"$instance"'
# The same, for families that every kind of target has (up, process_*, python_*, http_*).
ENGINE_TARGET = f"{TARGET},{ENGINE_JOBS}"
# Labels of vLLM's own families.
MODEL = f'{TARGET},model_name=~"$model_name"'
ENGINE = f'{MODEL},engine=~"$engine"'

# The servers of models that were not chosen; none with All. A vLLM server has one model, and this
# gauge from its first scrape on.
OTHER_MODELS = f'vllm:num_requests_running{{{TARGET},model_name!~"$model_name"}}'

BY_ENGINE = ("instance", "model_name", "engine")


def series(metric: str, *matchers: str, scope: str = ENGINE) -> str:
    """Return ``metric`` with the scope's matchers and more of them."""
    return f"{metric}{{{','.join((scope, *matchers))}}}"


def of_model(vector: str, scope: str) -> str:
    """Return ``vector``, without the servers of other models if its families carry no model.

    A server that tells no model yet, because it is loading, stays.
    """
    if not scope.startswith(ENGINE_TARGET):
        return vector
    return f"{vector} unless on (job, instance) {OTHER_MODELS}"


def by_clause(by: tuple[str, ...]) -> str:
    """Return ``by (...) `` or nothing."""
    return f"by ({', '.join(by)}) " if by else ""


def aggregate(
    how: str, metric: str, *matchers: str, by: tuple[str, ...] = (), scope: str = ENGINE
) -> str:
    """Return a gauge, aggregated over everything but ``by``."""
    selected = of_model(series(metric, *matchers, scope=scope), scope)
    return f"{how} {by_clause(by)}({selected})"


def rate(metric: str, *matchers: str, by: tuple[str, ...] = (), scope: str = ENGINE) -> str:
    """Return a counter's increase per second, summed over everything but ``by``."""
    per_second = f"rate({series(metric, *matchers, scope=scope)}[{WINDOW}])"
    return f"sum {by_clause(by)}({of_model(per_second, scope)})"


def ratio(part: str, whole: str) -> str:
    """Return ``part / whole``, or nothing where ``whole`` is zero: an idle engine has no ratio."""
    return f"{part} / ({whole} > 0)"


def mean(histogram: str, *, by: tuple[str, ...] = (), scope: str = ENGINE) -> str:
    """Return what one observation of ``histogram`` was on average."""
    return ratio(
        rate(f"{histogram}_sum", by=by, scope=scope), rate(f"{histogram}_count", by=by, scope=scope)
    )


def quantile(
    q: float, histogram: str, *, by: tuple[str, ...] = (), scope: str = ENGINE, extra: str = ""
) -> str:
    """Return a quantile of ``histogram``; nothing, and not NaN, where nothing was observed."""
    matchers = (extra,) if extra else ()
    buckets = rate(f"{histogram}_bucket", *matchers, by=("le", *by), scope=scope)
    return f"histogram_quantile({q}, {buckets}) >= 0"


def buckets(histogram: str, *, scope: str = ENGINE) -> str:
    """Return the rate per bucket, for a heatmap."""
    return rate(f"{histogram}_bucket", by=("le",), scope=scope)


def or_zero(expression: str) -> str:
    """Return 0 where the expression has no series: nothing has been counted yet."""
    return f"({expression}) or vector(0)"


def or_zero_named(expression: str, label: str, value: str) -> str:
    """Return one zero series with a label where the expression has none."""
    return f'({expression}) or label_replace(vector(0), "{label}", "{value}", "", "")'
