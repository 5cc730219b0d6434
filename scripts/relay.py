"""An HTTP relay that injects faults: `Relay(port)` forwards to 127.0.0.1:port, and delays, refuses or cuts the requests a test chooses.

`python scripts/relay.py PORT DELAY_S` is one in a process of its own that only delays; it prints the port it listens on.
A request is chosen by its first line. Every connection is closed after one answer, so that the next request passes through here as well.
"""

import contextlib
import os
import re
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
    """What the client gets instead of the server's answer.

    status: this HTTP status, and the request is not forwarded.   cut_after: a connection closed after so many bytes of the request.
    lost: a connection closed when the server has answered.
    """

    status: int = 0
    cut_after: int | None = None
    lost: bool = False


@dataclass
class Relay:
    """Listens on `self.port`.   delay_s: before each request is forwarded.   trouble: from a request line to what happens instead, or None.

    requests: the first line of every request so far.   asked_at: when each came, Unix time in s.
    """

    target: int
    delay_s: float = 0.0
    trouble: Trouble = lambda line: None
    requests: list[str] = field(default_factory=list)
    asked_at: list[float] = field(default_factory=list)

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
            self.asked_at.append(time.time())
            time.sleep(self.delay_s)
            answer = self.trouble(line)
            if answer is not None and answer.status:
                body = b"fault"
                reply = f"HTTP/1.1 {answer.status} Fault\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
                _drain(client, head)
                client.sendall(reply)
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                kept = re.sub(rb"\r\nconnection:[^\r]*", b"", head, flags=re.IGNORECASE)  # some clients send none
                server.sendall(kept.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
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
    """Read the rest of the request: a client that is still sending would not see the answer."""
    header, _, body = head.partition(b"\r\n\r\n")
    lengths = [int(h.split(b":")[1]) for h in header.split(b"\r\n") if h.lower().startswith(b"content-length:")]
    left = (lengths[0] if lengths else 0) - len(body)
    while left > 0 and (block := client.recv(65536)):
        left -= len(block)


if __name__ == "__main__":
    os.nice(19)  # it stands for a network, which takes no processor time from the training
    print(Relay(int(sys.argv[1]), delay_s=float(sys.argv[2])).port, flush=True)
    signal.pause()
