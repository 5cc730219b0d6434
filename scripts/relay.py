"""A relay before a server, for trouble: `Relay(port)` forwards HTTP to 127.0.0.1:port and does what it is told to some requests.

`python scripts/relay.py PORT DELAY_S` is one in a process of its own that only delays; it prints the port it listens on.
Knows requests only by their first line. Connections are closed after each answer, so that every request passes through here anew.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Trouble = Callable[[str], "Answer | None"]


@dataclass(frozen=True)
class Answer:
    """Instead of the server's: a status, or a closed connection, after `cut_after` bytes of the request or when the server has answered."""

    status: int = 0
    cut_after: int | None = None
    lost: bool = False


@dataclass
class Relay:
    """Listens on `self.port`.   delay_s: before each request is passed on.   trouble: from a request line to what happens instead."""

    target: int
    delay_s: float = 0.0
    trouble: Trouble = lambda line: None
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def uri(self) -> str:
        """Tracking URI."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Refuse connections from now on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                block = client.recv(65536)
                if not block:
                    return
                head += block
            line = head.split(b"\r\n", 1)[0].decode("latin-1")
            self.requests.append(line)
            time.sleep(self.delay_s)
            answer = self.trouble(line)
            if answer is not None and answer.status:
                body = b"trouble"
                reply = f"HTTP/1.1 {answer.status} Trouble\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
                _drain(client, head)
                client.sendall(reply)
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                head = head.replace(b"Connection: keep-alive", b"Connection: close", 1)
                server.sendall(head)
                if answer is not None and answer.lost:
                    threading.Thread(target=_pump, args=(client, server, None), daemon=True).start()
                    while server.recv(65536):
                        pass
                    client.shutdown(socket.SHUT_RDWR)
                    return
                back = threading.Thread(target=_pump, args=(server, client, None), daemon=True)
                back.start()
                _pump(client, server, answer.cut_after if answer else None)
                if answer is None:
                    back.join()


def _pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    passed = 0
    with contextlib.suppress(OSError):
        while block := source.recv(65536):
            sink.sendall(block)
            passed += len(block)
            if limit is not None and passed >= limit:
                break
        sink.shutdown(socket.SHUT_WR)


def _drain(client: socket.socket, head: bytes) -> None:
    """Read the body, for a client that is still sending would not see the answer."""
    header, _, body = head.partition(b"\r\n\r\n")
    lengths = [int(h.split(b":")[1]) for h in header.split(b"\r\n") if h.lower().startswith(b"content-length:")]
    left = (lengths[0] if lengths else 0) - len(body)
    while left > 0 and (block := client.recv(65536)):
        left -= len(block)


if __name__ == "__main__":
    os.nice(19)  # a distance, which costs no processor
    print(Relay(int(sys.argv[1]), delay_s=float(sys.argv[2])).port, flush=True)
    signal.pause()
