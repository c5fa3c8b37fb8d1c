"""Addresses that a server can listen on: IPv4 and IPv6, known before a model is loaded."""

from __future__ import annotations

import socket

from reap2gguf.errors import UsageError
from reap2gguf.messages import shown


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0, if a server can listen there; UsageError if not.

    A program that took this process's place would tell it in lines of its own, or load a model
    first. Between the look and its start another process may take the port; then it does.
    """
    with bound_socket(host, port) as found:
        return int(found.getsockname()[1])


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has an address of this machine, IPv4 or IPv6; UsageError if it cannot."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, number)
    except (OSError, UnicodeError) as error:
        raise _no_address(host, port, error) from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen()
    except OSError as error:
        found.close()
        raise _no_address(host, port, error) from error
    return found


def _no_address(host: str, port: int, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(
        f"{shown(host)[1:-1]}:{port}: cannot listen there ({reason}); pass another --port or --host"
    )


def address_of(host: str, port: int) -> str:
    """Where OpenAI clients find a server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
