"""The guard before llama-cpp-python's server, with a server in its place that echoes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.gguf_files.reader import GgufHeader
from reap2gguf.local import python_server
from reap2gguf.local.prompts import Prompts
from reap2gguf.local.python_server import Guard, is_loopback

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
TEMPLATE = (
    "{% if messages[0].content == 'bad' %}{{ 1 + 'a' }}{% endif %}{{ messages[0].content }}"
    "{{ enable_thinking }}{{ tools | length if tools }}"
)


@pytest.fixture(scope="module")
def prompts() -> Any:
    made = Prompts(Path("x"), GgufHeader(Path("x"), {"tokenizer.chat_template": TEMPLATE}, {}, 0))
    yield made
    made.close()


class Echo:
    """An application that answers with the body, and notes the prompt that it would use."""

    def __init__(self) -> None:
        self.prompts: list[str | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.prompts.append(python_server._PROMPT.get(None))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})


def ask(
    prompts: Prompts,
    body: Any = b"",
    bound: str = "127.0.0.1",
    path: str = CHAT,
    method: str = "POST",
    **headers: str,
) -> tuple[int, bytes, Echo]:
    """Status, body, and what the application saw."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    pieces = [raw[:5], raw[5:]]
    given = {"host": "127.0.0.1:8080", "content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in given.items() if value],
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    echo = Echo()
    asyncio.run(Guard(echo, prompts, bound)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"], echo


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("127.0.0.1", {"host": "localhost"}, 200),
        ("127.0.0.1", {"host": "LOCALHOST:99"}, 200),
        ("127.0.0.1", {"host": "[::1]:8080"}, 200),
        ("::1", {"host": "[::1]"}, 200),
        ("127.0.0.1", {"host": "evil.example"}, 403),
        ("127.0.0.1", {"host": "127.0.0.1.evil.example:8080"}, 403),
        ("127.0.0.1", {"host": "localhost.evil.example"}, 403),
        ("127.0.0.1", {"host": "[::1"}, 403),
        ("127.0.0.1", {"host": ""}, 403),
        ("localhost", {"host": "192.168.0.7"}, 403),
        ("0.0.0.0", {"host": "192.168.0.7:8080"}, 200),
        ("0.0.0.0", {"host": "my-machine"}, 200),
        ("127.0.0.1", {"origin": "http://localhost:3000"}, 200),
        ("127.0.0.1", {"origin": "http://127.0.0.1:8080"}, 200),
        ("127.0.0.1", {"origin": "https://evil.example"}, 403),
        ("127.0.0.1", {"origin": "null"}, 403),
        ("127.0.0.1", {"origin": "http://localhost.evil.example"}, 403),
        ("0.0.0.0", {"host": "my-machine:8080", "origin": "http://my-machine"}, 200),
        ("0.0.0.0", {"host": "my-machine:8080", "origin": "http://other"}, 403),
        ("127.0.0.1", {"content_type": "application/json; charset=utf-8"}, 200),
        ("127.0.0.1", {"content_type": "text/plain"}, 415),
        ("127.0.0.1", {"content_type": "application/x-www-form-urlencoded"}, 415),
        ("127.0.0.1", {"content_type": ""}, 415),
    ],
)  # fmt: skip
def test_who_may_ask(host: str, headers: dict[str, str], status: int, prompts: Prompts) -> None:
    found, body, echo = ask(prompts, HELLO, host, **headers)
    assert found == status
    if status == 200:
        assert json.loads(body) == HELLO
    else:
        assert echo.prompts == []
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_page_of_another_site_may_not_even_look(prompts: Prompts) -> None:
    for method in ("GET", "OPTIONS"):
        asked = ask(prompts, path="/v1/models", method=method, origin="http://evil.example")
        assert asked[0] == 403
        assert ask(prompts, path="/v1/models", method=method, content_type="")[0] == 200


def test_the_prompt_is_rendered_before_the_server_sees_the_request(prompts: Prompts) -> None:
    assert ask(prompts, HELLO)[2].prompts == ["Hello"]
    more = {**HELLO, "tools": [{}, {}], "chat_template_kwargs": {"enable_thinking": False}}
    assert ask(prompts, more)[2].prompts == ["HelloFalse2"]
    assert ask(prompts, {"prompt": "x"}, path="/v1/completions")[2].prompts == [None]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"messages": [{"role": "user", "content": "bad"}]}, "the chat template refuses it"),
        ({"messages": [{"role": "user", "content": "bad"}], "stream": True}, "refuses it"),
        ({"messages": [5]}, "messages is not a list of objects"),
        ({**HELLO, "tools": 5}, "expected tools as a list"),
        ({**HELLO, "chat_template_kwargs": [1]}, "chat_template_kwargs as an object"),
    ],
)
def test_what_the_template_refuses_is_an_answer(body: Any, reason: str, prompts: Prompts) -> None:
    status, said, echo = ask(prompts, body)
    assert status == 400
    assert reason in json.loads(said)["error"]["message"]
    assert echo.prompts == []


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 10**5, b"5", b'{"messages": 5}'])
def test_what_is_no_chat_is_left_to_the_server(body: bytes, prompts: Prompts) -> None:
    status, said, echo = ask(prompts, body)
    assert (status, said, echo.prompts) == (200, body, [None])


def test_a_body_has_a_limit(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_server, "_MAX_BODY_BYTES", 20)
    assert ask(prompts, HELLO)[0] == 413


def test_names_of_this_machine() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost", "a.localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "example.org", "10.0.0.1")))
