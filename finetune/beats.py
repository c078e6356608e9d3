"""Whether the launching side still lives, told over TCP to the nodes that hear nothing of it on their standard input (pdsh).

A node's launcher connects and says the job's mark, which no other process should know; from then on it gets a beat every few
seconds. The end of the connection, or silence, tells it that the launching side is gone.
"""

import secrets
import socket
import threading
from contextlib import suppress

_PATIENCE = 10.0  # seconds: for a connection to be made, and for its first line
_LONGEST = 256  # bytes of that line


class Beats:
    """The launching side: a port on all of its addresses, and the nodes that listen to it."""

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
        self._listeners: list[socket.socket] = []

    @property
    def port(self) -> int:
        """Where the nodes connect to."""
        return int(self._server.getsockname()[1])

    def start(self, mark: str) -> None:
        """Let in those who know the mark from now on."""
        threading.Thread(target=self._accept, args=(mark.strip().encode(),), daemon=True).start()

    def send(self, words: bytes) -> None:
        """Say something to every node; one that is gone is found by its start's end."""
        for listener in list(self._listeners):
            with suppress(OSError):
                listener.send(words)

    def close(self) -> None:
        """Hang up: every node ends its ranks."""
        for one in [self._server, *self._listeners]:
            with suppress(OSError):  # also wakes the thread that waits in it
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self, mark: bytes) -> None:
        with suppress(OSError):  # closed
            while True:
                node, _ = self._server.accept()
                threading.Thread(target=self._let_in, args=(node, mark), daemon=True).start()

    def _let_in(self, node: socket.socket, mark: bytes) -> None:
        node.settimeout(_PATIENCE)
        with suppress(OSError):
            with node.makefile("rb") as stream:
                known = secrets.compare_digest(stream.readline(_LONGEST).strip(), mark)
            if known:
                node.setblocking(False)  # a node that does not take its beats does not hold up the others'
                self._listeners.append(node)
                return
        node.close()


def listen_to(address: tuple[str, int], mark: str) -> socket.socket:
    """The node's side: a connection that carries the beats. Raises OSError."""
    line = socket.create_connection(address, timeout=_PATIENCE)
    line.sendall(mark.strip().encode() + b"\n")
    line.setblocking(True)
    return line
