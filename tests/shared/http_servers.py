# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Small HTTP servers of tests: a handler for what they answer, and a free port of this machine."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Mapping
from typing import Any


class Handler(http.server.BaseHTTPRequestHandler):
    """Logs nothing."""

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def reply(
        self,
        content: bytes = b"",
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        self.send_response(status, reason)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class LocalServer:
    """Serves from when it is made until it is stopped."""

    def __init__(
        self, handler: type[http.server.BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None
    ) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.place = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.place}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
