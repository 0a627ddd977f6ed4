"""A port for processes that start later."""

import random
import socket

# Below those that systems give to connections, which would take a port in the time until somebody listens at it.
PORTS = range(20000, 32000)


def free_port() -> int:
    """Of this machine; nobody listens at it now."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
