"""An HTTP server of the loopback interface that has its requests answered by a function."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

# method, path, query, body, user agent -> status and body; None: the connection is closed instead.
Answer = Callable[[str, str, dict[str, str], Any, str], "tuple[int, Any] | None"]


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[int]:
    """Serve on a free port, which is given."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # An answer is one write: in two, the second one waits for an ACK.
        timeout = 60

        def _serve(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(text) if text.strip() else None
            agent = self.headers.get("User-Agent", "")
            path = urllib.parse.unquote(url.path)
            answered = answer(self.command, path, query, body, agent)
            if answered is None:
                self.close_connection = True
                return
            status, given = answered
            data = json.dumps(given).encode()
            with contextlib.suppress(ConnectionError):  # The client may be dead by now.
                self.send_response(status)
                self.send_header("Content-Type", "application/json; charset=UTF-8")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()
                return
            self.close_connection = True

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

        def finish(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().finish()

        def log_message(self, *_: Any) -> None:
            """Nothing: requests are kept by who answers them."""

        do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = _serve

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
