"""The server, over HTTP, against llama-cpp-python called directly."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from llama_cpp import Llama

from reap2gguf import vendor
from reap2gguf.cli import cli
from reap2gguf.local.engine import Engine, EngineOptions
from reap2gguf.local.server import ModelServer
from tests.conftest import Bundle
from tests.tiny import REPOSITORY

ROOT = REPOSITORY
GREEDY = {"temperature": 0, "max_tokens": 10}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(built: Bundle) -> Path:
    return built.gguf / "example-IQ4_K_M.gguf"


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, str]:
    """What llama-cpp-python says to the same questions."""
    with closing(Llama(str(model), n_ctx=256, n_threads=2, verbose=False)) as llama:
        chat = llama.create_chat_completion(HELLO, **GREEDY)
        text = llama.create_completion("The sky", **GREEDY)
    return {
        "chat": chat["choices"][0]["message"]["content"],
        "text": text["choices"][0]["text"],
    }


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def server(model: Path, notes: list[str]) -> Iterator[ModelServer]:
    with ModelServer("127.0.0.1", 0, "example", notes.append) as server:
        engine = Engine(model, EngineOptions(256, 2, -1))
        thread = threading.Thread(target=server.serve, args=(engine,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: ModelServer, path: str, body: Any = None, method: str | None = None) -> Any:
    """Status and body of a request."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    url = f"{server.address.removesuffix('/v1')}{path}"
    request = urllib.request.Request(url, data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def events(text: str) -> list[Any]:
    """The chunks of a stream, which must end as OpenAI's do."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def test_a_chat_is_answered_whole_and_in_pieces(
    server: ModelServer, expected: dict[str, str]
) -> None:
    body = {"model": "any", "messages": HELLO, **GREEDY, "unknown": {"field": 1}, "stop": None}
    status, text = ask(server, "/v1/chat/completions", body)
    answer = json.loads(text)
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "example"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected["chat"]}
    assert answer["usage"]["completion_tokens"] == 10
    status, text = ask(server, "/v1/chat/completions", {**body, "stream": True})
    chunks = events(text)
    assert status == 200
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"}
    assert "".join(delta.get("content", "") for delta in deltas) == expected["chat"]
    assert len(deltas) > 5
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stop", [None, "the"])
def test_a_stream_can_end_with_the_numbers_of_a_whole_answer(
    server: ModelServer, stop: str | None
) -> None:
    body = {"messages": HELLO, "seed": 3, "temperature": 0.9, "max_tokens": 30, "stop": stop}
    whole = json.loads(ask(server, CHAT, body)[1])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(ask(server, CHAT, {**body, **options})[1])
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"] == []
    assert not any("usage" in chunk for chunk in chunks[:-1])


def test_parts_of_text_and_newer_names_are_understood(
    server: ModelServer, expected: dict[str, str]
) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    body = {
        "messages": [{"role": "user", "content": parts}], "temperature": 0,
        "max_completion_tokens": 10,
    }  # fmt: skip
    _, text = ask(server, "/v1/chat/completions", body)
    assert json.loads(text)["choices"][0]["message"]["content"] == expected["chat"]


def test_a_completion_is_answered_whole_and_in_pieces(
    server: ModelServer, expected: dict[str, str]
) -> None:
    body = {"prompt": "The sky", **GREEDY}
    _, text = ask(server, "/v1/completions", body)
    assert json.loads(text)["choices"][0]["text"] == expected["text"]
    _, text = ask(server, "/v1/completions", {**body, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in events(text)) == expected["text"]


def test_models_and_health(server: ModelServer) -> None:
    status, text = ask(server, "/v1/models")
    assert status == 200
    assert [entry["id"] for entry in json.loads(text)["data"]] == ["example"]
    assert ask(server, "/health") == (200, '{"status": "ok"}')


def test_requests_at_a_time_are_answered_one_after_the_other(
    server: ModelServer, expected: dict[str, str]
) -> None:
    body = {"messages": HELLO, **GREEDY}
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda streams: ask(server, "/v1/chat/completions", {**body, "stream": streams}),
                (False, True, False, True),
            )
        )
    assert [status for status, _ in found] == [200] * 4
    for _, text in found[::2]:
        assert json.loads(text)["choices"][0]["message"]["content"] == expected["chat"]
    for _, text in found[1::2]:
        deltas = [chunk["choices"][0]["delta"] for chunk in events(text)]
        assert "".join(delta.get("content", "") for delta in deltas) == expected["chat"]


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (CHAT, b'{"messages": [', 400, "the body is not valid JSON"),
        (CHAT, b"\xff\xff", 400, "the body is not valid JSON"),
        (CHAT, b"[" * 100_000, 400, "the body is not valid JSON"),
        (CHAT, b"[]", 400, "the body is no JSON object"),
        (CHAT, {}, 400, "messages is None, expected a list of messages"),
        (CHAT, {"messages": []}, 400, "messages is [], expected a list"),
        (CHAT, {"messages": ["x"]}, 400, "messages[0] is 'x', expected an object"),
        (CHAT, {"messages": [{"role": "king"}]}, 400, "messages[0].role is 'king'"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content is 5"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
         "this server sees no images"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half characters"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature is 'hot', expected"),
        (CHAT, {"messages": HELLO, "temperature": True}, 400, "temperature is True"),
        (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400,
         "temperature is nan"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens is 0, expected an integer"),
        (CHAT, {"messages": HELLO, "max_tokens": 1.5}, 400, "max_tokens is 1.5"),
        (CHAT, {"messages": HELLO, "seed": 10**40}, 400, "seed is 1000"),
        (CHAT, {"messages": HELLO, "n": 2}, 400, "n is 2, expected 1"),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools is [{"),
        (CHAT, {"messages": HELLO, "logprobs": True}, 400, "logprobs is True, expected nothing"),
        (CHAT, {"messages": HELLO, "stream": "yes"}, 400, "stream is 'yes'"),
        (CHAT, {"messages": HELLO, "stop": [1]}, 400, "stop is [1]"),
        (CHAT, {"messages": HELLO, "stream_options": 1}, 400, "stream_options is 1"),
        (CHAT, {"messages": HELLO, "response_format": 3}, 400, "response_format is 3"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 400}]}, 400,
         "exceed context window of 256"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 400}], "stream": True}, 400,
         "exceed context window of 256"),
        (TEXT, {"prompt": 3}, 400, "prompt is 3, expected a text"),
        ("/v1/embeddings", {}, 404, "there is nothing here"),
        (CHAT, None, 405, "/v1/chat/completions takes no GET"),
        ("/v1/models", {}, 405, "/v1/models takes no POST"),
    ],
)  # fmt: skip
def test_a_bad_request_is_answered_in_openais_form(
    path: str, body: Any, status: int, message: str, server: ModelServer
) -> None:
    found, text = ask(server, path, body)
    error = json.loads(text)["error"]
    assert found == status, text
    assert message in error["message"]
    assert error.keys() == {"message", "type", "code"}
    assert error["type"] == "invalid_request_error"


def test_bodies_are_bounded_and_their_length_is_wanted(server: ModelServer) -> None:
    host, port = server.server_address[:2]
    for header, status in ((("Content-Length", str(2**40)), 413), (("X-None", "1"), 411),
                           (("Content-Length", "-5"), 411)):  # fmt: skip
        with closing(http.client.HTTPConnection(str(host), port, timeout=10)) as connection:
            connection.putrequest("POST", CHAT)
            connection.putheader(*header)
            connection.endheaders()
            answer = connection.getresponse()
            assert answer.status == status
            assert "error" in json.loads(answer.read())


def test_a_client_that_is_gone_in_mid_stream_does_no_harm(
    server: ModelServer, expected: dict[str, str], notes: list[str]
) -> None:
    body = json.dumps({"messages": HELLO, "temperature": 0, "stream": True}).encode()
    for wanted in (1, 400):
        with socket.create_connection(server.server_address[:2], timeout=10) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            connection.recv(wanted)
    _, text = ask(server, CHAT, {"messages": HELLO, **GREEDY})
    assert json.loads(text)["choices"][0]["message"]["content"] == expected["chat"]
    assert not any("a request failed" in note for note in notes)


def test_a_port_in_use_is_one_line(server: ModelServer, built: Bundle) -> None:
    port = str(server.server_address[1])
    command = ["serve", str(built.gguf), "--file", "BF16", "--port", port, "--engine", "python"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2
    assert result.output.startswith(f"Error: 127.0.0.1:{port}: cannot listen there (Address alr")
    assert len(result.output.splitlines()) == 1
    result = CliRunner().invoke(cli, [*command, "--parallel", "2"])
    assert "one request is answered at a time" in result.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_mid_answer(built: Bundle, number: signal.Signals) -> None:
    command = [
        sys.executable, "-m", "reap2gguf", "serve", str(built.gguf), "--port", "0",
        "--engine", "python", "--context", "100000",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(vendor.VARIABLE, None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address, name = process.stdout.readline().split()
        assert name == "example-IQ4_K_M"
        body = json.dumps({"messages": HELLO, "stream": True, "temperature": 0}).encode()
        with urllib.request.urlopen(f"{address}/chat/completions", body, timeout=30) as answer:
            assert answer.readline().startswith(b"data: ")
            process.send_signal(number)
            answer.read()
        assert process.wait(20) == 130
        errors = process.stderr.read()
    assert errors.splitlines()[-1] == "Error: interrupted"
    assert "Traceback" not in errors
