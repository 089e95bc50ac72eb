"""A TCP hop on loopback that cuts its first connection after some bytes."""

from __future__ import annotations

import contextlib
import socket
import threading


class Cutter:
    """Passes everything on in both directions; `after` so many bytes towards the client it closes that connection."""

    def __init__(self, target: str, *, after: int) -> None:
        self._target = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._left: int | None = after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                server = socket.create_connection(self._target)
                for source, sink, down in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pump, args=(source, sink, down), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, down: bool) -> None:
        with contextlib.suppress(OSError):  # the other direction was closed
            while data := source.recv(1 << 18):
                if down and self._left is not None:
                    self._left -= len(data)
                    if self._left < 0:
                        self._left = None
                        break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
