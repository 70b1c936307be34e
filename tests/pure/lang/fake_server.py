"""A small HTTP server that keeps what it was sent and answers from a function."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (status, JSON body or text), or the events of a stream
Reply = tuple[int, Any] | list[Any]


class FakeServer:
    def __init__(self, answer: Callable[[str, Any], Reply]) -> None:
        self.answer = answer
        self.requests: list[tuple[str, Any, dict[str, str]]] = []  # path, body, headers
        self.connections = 0
        self.hang_up = False  # close each connection after its answer, without saying so
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def do_POST(self) -> None:
                self.close_connection = False
                size = int(self.headers["Content-Length"] or 0)
                body = json.loads(self.rfile.read(size) or b"null")
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.requests.append((self.path, body, headers))
                reply = outer.answer(self.path, body)
                if isinstance(reply, list):
                    self._stream(reply)
                else:
                    data = reply[1] if isinstance(reply[1], bytes) else json.dumps(reply[1]).encode()
                    self.send_response(reply[0])
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                self.close_connection |= outer.hang_up

            do_GET = do_POST

            def _stream(self, events: list[Any]) -> None:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for event in events:
                    if event is None:  # the connection breaks
                        self.close_connection = True
                        return
                    data = f"event: {event.get('type')}\ndata: {json.dumps(event)}\n\n".encode()
                    half = len(data) // 2  # an event may come in pieces
                    for piece in (data[:half], data[half:]):
                        self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                    self.wfile.flush()
                self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on the terminal."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[FakeServer]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
