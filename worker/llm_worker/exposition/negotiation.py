"""Content negotiation: from a request's headers to the page's format and compression.

Knows the two content types the page has, and nothing of the page itself. Never fails: a header that
makes no sense asks for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def choose_format(accept: str | None) -> str:
    """The content type to answer with: the best the scraper takes, by RFC 9110's rules.

    For each format the most specific range that covers it decides; the format with the higher
    quality wins, then the one named earlier, then the text format, which also is the answer to
    whoever takes neither.
    """
    ranges = list(_ranges(accept))

    def rank(format_: str) -> tuple[float, int]:
        """The quality the scraper gives the format, and minus its place in the header."""
        covering = [
            (specificity, quality, -position)
            for position, (range_, parameters, quality) in enumerate(ranges)
            if (specificity := _specificity(range_, parameters, format_))
        ]
        _, quality, place = max(covering, default=(0, 0.0, 0))
        return (quality, place) if quality > 0 else (0.0, 0)

    return max((TEXT, OPENMETRICS), key=rank)


def accepts_gzip(accept_encoding: str | None) -> bool:
    """Whether the scraper takes a compressed page; without a word of it, no."""
    qualities = {coding: quality for coding, _, quality in _ranges(accept_encoding)}
    return qualities.get("gzip", qualities.get("*", 0.0)) > 0


def _specificity(range_: str, parameters: Mapping[str, str], format_: str) -> int:
    """How closely a range of the header Accept describes the format; 0: it does not cover it."""
    version = parameters.get("version", "1.0.0")
    if format_ == OPENMETRICS and not re.fullmatch(r"1(\.\d+)*", version):
        return 0
    kind = format_.partition(";")[0]
    return {kind: 3, f"{kind.partition('/')[0]}/*": 2, "*/*": 1}.get(range_, 0)


def _ranges(header: str | None) -> Iterator[tuple[str, dict[str, str], float]]:
    """What a header like Accept lists: the value, its parameters, its quality."""
    for element in (header or "").split(","):
        value, *rest = (part.strip() for part in element.split(";"))
        if not value:
            continue
        parameters = dict(part.split("=", 1) for part in rest if "=" in part)
        try:
            quality = float(parameters.pop("q", "1"))
        except ValueError:
            quality = 0.0
        yield value.lower(), parameters, quality
