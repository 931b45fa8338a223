"""A TCP proxy on loopback that adds a delay to each request and counts bytes, as a far object store would.

A piece that comes from the client while the server owes it nothing begins a request; it is held back for the delay.
Requests of one connection follow each other, connections do not wait for each other. It runs in threads of the process
that starts it, which should do little else.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType

PIECE_BYTES = 2**20


class DelayProxy:
    """Forwards connections to host:port. `delay_s` may be changed while it runs; counts are of all connections."""

    def __init__(self, port: int, delay_s: float = 0.0) -> None:
        self._target = ("127.0.0.1", port)
        self.delay_s = delay_s
        self.num_requests = self.num_bytes = 0
        self._server = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(PIECE_BYTES):
                self.num_requests += 1
                if self.delay_s:
                    time.sleep(self.delay_s)
                server.sendall(data)
        _close(server)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        buffer = bytearray(PIECE_BYTES)
        view = memoryview(buffer)
        with contextlib.suppress(OSError):
            while count := server.recv_into(view):
                self.num_bytes += count
                client.sendall(view[:count])
        _close(client)

    def __enter__(self) -> DelayProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        one.close()
