"""HTTP servers on the loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Loopback(ThreadingHTTPServer):
    """Serves until it is closed. It prints no errors, such as those of clients that were killed.

    Args:
        handler: answers requests.
        owner: what the handler finds as `server.owner`.
        port: 0 for any free port.
    """

    daemon_threads = True
    request_queue_size = 128  # with the default of 5, further connections would wait for a second

    def __init__(self, handler: type["Answering"], owner: Any = None, port: int = 0):
        super().__init__(("127.0.0.1", port), handler)
        self.owner, self.url = owner, f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *args: Any) -> None:
        pass

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Answering(BaseHTTPRequestHandler):
    """Answers with bytes or with JSON."""

    server: Loopback
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written one after the other

    def log_message(self, *args: Any) -> None:
        pass

    def asked(self) -> dict[str, Any]:
        """The body of a request, read as JSON."""
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body: Any = b"", status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
