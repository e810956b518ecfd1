"""A network between client and server that can be cut."""

import socket
import threading


class Proxy:
    """Forwards connections to a server and cuts them all after so many bytes of answers (None: never; 0: answers
    nothing)."""

    def __init__(self, port: int, cut_after_bytes: int) -> None:
        self._port, self._left = port, cut_after_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = [self._listener]
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with self._lock:
            for sock in self._sockets:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", self._port), 10)
            self._sockets += [client, upstream]
            for pair in ((client, upstream, False), (upstream, client, True)):
                threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(65536):
                if counted:
                    with self._lock:
                        self._left -= len(data)
                    if self._left < 0:
                        return self.close()
                target.sendall(data)
        except OSError:
            return None
