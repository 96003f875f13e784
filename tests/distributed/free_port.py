"""Ports for process groups, which listen a while after somebody has chosen the port."""

import random
import socket

_chosen = random.SystemRandom()  # tests that run beside each other may have one seed


def free_port():
    """A port nobody listens on, below those that systems hand to sockets that ask for any.

    A port out of that range may be another test's by the time that it is used: gloo's connections take dozens of them.
    """
    for _ in range(100):
        port = _chosen.randrange(12000, 32000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError("of 100 ports tried none is free")
