"""Pages for one person's browser or scraper, on the loopback interface.

Invariant: nothing but the named pages is there, and for nobody from another machine.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from grpo_worker.errors import ConfigError


@contextmanager
def serve_pages(flag: str, port: int, kind: str, pages: Mapping[str, Callable[[], str]]) -> Iterator[str]:
    """Serve until the block ends. Yields the address, such as http://127.0.0.1:9464.

    Args:
        flag: of the command line, for the error. port: 0 for any free one. kind: the pages' Content-Type. pages: their text by path.

    Raises:
        ConfigError: the port is in use.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            if page is None:
                self.send_error(404, f"only {', '.join(pages)} is here")
                return
            body = page().encode(errors="replace")
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """A request is no news."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigError(
            f"{flag} {port}: cannot listen: {error.strerror or error}. Choose another port, or 0 for any free one."
        ) from error
    server.daemon_threads = True
    Thread(target=server.serve_forever, name="pages", daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
