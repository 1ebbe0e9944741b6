"""NOT Grafana: answers the health check of the compose file, and says so on every other page.

It stands in where no registry answers. It never reads a dashboard or a data source, so no test may
take its answers as proof that a dashboard works.
"""

from __future__ import annotations

import json
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WHAT_THIS_IS = "This is not Grafana. It is a stand-in of tests/images that answers /api/health."


class _Handler(BaseHTTPRequestHandler):
    server_version = "not-grafana"

    def do_GET(self) -> None:
        if self.path == "/api/health":
            self._answer(200, {"database": "ok", "version": "not-grafana", "note": WHAT_THIS_IS})
        else:
            self._answer(501, {"error": WHAT_THIS_IS})

    do_HEAD = do_GET  # noqa: N815 - http.server's names

    def _answer(self, status: int, body: dict[str, str]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def main() -> None:
    """Serve on port 3000 until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(WHAT_THIS_IS, flush=True)
    ThreadingHTTPServer(("0.0.0.0", 3000), _Handler).serve_forever()


if __name__ == "__main__":
    main()
