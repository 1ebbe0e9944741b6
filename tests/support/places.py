"""Where things lie in the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Recorded /metrics pages, a folder a kind: scripts/record_fixtures.
FIXTURES = ROOT / "tests" / "integration" / "fixtures"
