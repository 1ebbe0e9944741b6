"""NOT Grafana: answers the health check of the compose file and an empty scrape, no more.

It stands in where no registry answers. It never reads a dashboard or a data source, so no test may
take its answers as proof that a dashboard works.
"""

from __future__ import annotations

import json
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WHAT_THIS_IS = "This is not Grafana: a stand-in of tests/images that answers its health check."


class _Handler(BaseHTTPRequestHandler):
    server_version = "not-grafana"

    def do_GET(self) -> None:
        if self.path == "/api/health":
            self._answer(200, {"database": "ok", "version": "not-grafana", "note": WHAT_THIS_IS})
        elif self.path == "/metrics":
            # Without a sample: else the target would be down, and an alert about it fire.
            self._send(200, "text/plain; version=0.0.4", f"# {WHAT_THIS_IS}\n")
        else:
            self._answer(501, {"error": WHAT_THIS_IS})

    do_HEAD = do_GET  # noqa: N815 - http.server's names

    def _answer(self, status: int, body: dict[str, str]) -> None:
        self._send(status, "application/json", json.dumps(body))

    def _send(self, status: int, content_type: str, text: str) -> None:
        payload = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
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
