"""The server among clients that do not send, read or stay."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from reap2gguf.errors import UsageError
from reap2gguf.local import server as server_module
from reap2gguf.local.engine import Engine, EngineOptions
from reap2gguf.local.server import ModelServer
from tests.conftest import Bundle

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(built: Bundle) -> Iterator[ModelServer]:
    with ModelServer("127.0.0.1", 0, "example", lambda text: None) as server:
        engine = Engine(built.gguf / "example-IQ4_K_M.gguf", EngineOptions(256, 2, -1))
        thread = threading.Thread(target=server.serve, args=(engine,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def status(server: ModelServer) -> int:
    url = f"{server.address.removesuffix('/v1')}/health"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def request_of(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def test_nobody_is_answered_who_is_gone(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole answer as well, which is written at its end only."""
    assert server.engine is not None
    asked = threading.Event()
    llama = server.engine._llama
    usual, n_chosen = llama.generate, []

    def slowly(*arguments: Any, **named: Any) -> Iterator[int]:
        for token in usual(*arguments, **named):
            n_chosen.append(token)
            asked.set()
            time.sleep(0.02)
            yield token

    monkeypatch.setattr(llama, "generate", slowly)
    with socket.create_connection(server.server_address[:2], timeout=10) as connection:
        connection.sendall(request_of({"messages": HELLO, "temperature": 0, "max_tokens": 200}))
        assert asked.wait(10)
    with server.turn:
        assert len(n_chosen) < 50


def test_a_client_that_does_not_read_loses_its_turn(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_STALL_SECONDS", 0.3)
    monkeypatch.setattr(
        server_module, "_chatting", lambda *_: lambda streams: iter([{"x": "x" * 2**20}] * 50)
    )
    with socket.create_connection(server.server_address[:2], timeout=10) as connection:
        connection.sendall(request_of({"messages": HELLO, "stream": True}))
        connection.recv(1)
        begun = time.monotonic()
        with server.turn:
            assert time.monotonic() - begun < 5


def test_a_request_that_never_arrives_is_given_up(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_ARRIVAL_SECONDS", 0.2)
    for sent in (b"", b"POST /v1/completions HT", request_of({"prompt": "x" * 99})[:-9]):
        with socket.create_connection(server.server_address[:2], timeout=10) as connection:
            connection.sendall(sent)
            answer = b""
            while piece := connection.recv(4096):  # ends, or this times out
                answer += piece
    assert b"the body ends after" in answer
    assert not server.arriving


def test_there_may_be_so_many_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_MAX_CLIENTS", 2)
    with ModelServer("127.0.0.1", 0, "example", lambda text: None) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        with ExitStack() as opened:
            for _ in range(2):
                opened.enter_context(socket.create_connection(server.server_address[:2], 10))
            assert status(server) == 503
        for _ in range(100):
            if status(server) == 200:
                break
            time.sleep(0.02)
        assert status(server) == 200, "the seats are free again"
        server.shutdown()
        thread.join()


def test_it_listens_on_ipv6_too() -> None:
    with ModelServer("::1", 0, "example", print) as server:
        assert server.address == f"http://[::1]:{server.server_address[1]}/v1"
        socket.create_connection(server.server_address[:2], timeout=10).close()
    with pytest.raises(UsageError, match=r"nowhere\.invalid:0: cannot listen there"):
        ModelServer("nowhere.invalid", 0, "example", print)
