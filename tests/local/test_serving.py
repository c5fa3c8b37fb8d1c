"""The server that `serve` starts: its arguments, and the real one if it is installed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from llama_cpp import Llama

from reap2gguf import vendor
from reap2gguf.cli import cli
from reap2gguf.local import programs, serving
from tests.conftest import Bundle
from tests.local.altered import altered
from tests.tiny import ONE_THREAD, REPOSITORY

HELLO = [{"role": "user", "content": "Hello"}]
# the defaults of the server and of the library differ in `repeat_penalty`
GREEDY = {"temperature": 0, "max_tokens": 10, "repeat_penalty": 1.0}
needs_server = pytest.mark.skipif(
    bool(serving.missing_for_server()), reason="needs the extra `serve`"
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vendor.VARIABLE, raising=False)


class Started(Exception):
    """What would have taken the place of this process."""

    def __init__(self, program: Path, command: list[str], environment: dict[str, str]) -> None:
        self.program, self.command, self.environment = program, command, environment


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: Any) -> None:
        raise Started(*arguments)

    monkeypatch.setattr(programs.os, "execve", start)
    monkeypatch.setattr(serving, "missing_for_server", list)


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["serve", *map(str, arguments), "--engine", "python"])


@pytest.mark.usefixtures("started")
def test_the_python_server_receives_the_options(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HOST", "elsewhere"), ("PORT", "1"), ("CONFIG_FILE", "/x"), ("ELSE", "y")):
        monkeypatch.setenv(name, value)
    (bundle.gguf / "mmproj-example-F16.gguf").write_text("")
    result = serve(bundle.gguf, "--port", 8123, "--threads", 3, "--context", 1000)
    found = result.exception
    assert isinstance(found, Started), result.output
    assert found.program == Path(sys.executable)
    assert found.command == [
        sys.executable,
        *("-P", "-c", serving._BOOT, str(REPOSITORY)),
        f"--model={bundle.gguf / 'example-IQ4_K_M.gguf'}",
        "--model_alias=example-IQ4_K_M",
        *("--host=127.0.0.1", "--port=8123", "--n_ctx=1024", "--n_threads=3"),
        *("--n_threads_batch=3", "--n_gpu_layers=-1", "--verbose=False"),
    ]
    assert (found.environment["HOST"], found.environment["PORT"]) == ("127.0.0.1", "8123")
    assert "CONFIG_FILE" not in found.environment
    assert found.environment["ELSE"] == "y"
    assert result.stdout == "http://127.0.0.1:8123/v1  example-IQ4_K_M (llama_cpp.server)\n"
    assert "mmproj-example-F16.gguf is not used: images need llama-server\n" in result.stderr


@pytest.mark.usefixtures("started")
def test_verbose_prints_the_command(built: Bundle) -> None:
    result = serve(built.gguf, "--file", "BF16", "--port", 0, "-v")
    assert isinstance(result.exception, Started)
    assert "--verbose=True" in result.exception.command
    assert f"running {sys.executable} -P -c " in result.stderr


@pytest.mark.usefixtures("started")
def test_a_port_in_use_is_one_line(built: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = serve(built.gguf, "--file", "BF16", "--port", port)
    assert result.exit_code == 2
    assert result.output.startswith(f"Error: 127.0.0.1:{port}: cannot listen there (Address alr")
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70 + ".b", "\x1b[2J"])
def test_a_host_of_another_machine_is_one_line(host: str, built: Bundle) -> None:
    result = serve(built.gguf, "--file", "BF16", "--host", host, "--engine", "python")
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert result.output.isprintable() or result.output[:-1].isprintable()


@pytest.mark.usefixtures("started")
def test_several_requests_at_a_time_need_llama_server(built: Bundle) -> None:
    result = serve(built.gguf, "--file", "BF16", "--parallel", 2)
    assert result.exit_code == 2
    assert "--parallel 2: llama-cpp-python's server answers one request at a time" in result.output


@pytest.mark.usefixtures("started")
def test_a_file_at_which_llama_cpp_would_abort_is_refused(built: Bundle, tmp_path: Path) -> None:
    raw = (built.gguf / "example-IQ4_K_M.gguf").read_bytes()
    name = b"qwen3moe.block_count"
    at = raw.index(name) + len(name) + 4
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(raw[:at] + (9999).to_bytes(4, "little") + raw[at + 4 :])
    result = serve(broken, "--port", 0)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "block_count is 9999, expected 1 to 512" in result.output


def test_without_its_packages_the_error_says_what_to_install(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "missing_for_server", lambda: ["uvicorn", "fastapi"])
    monkeypatch.setenv("PATH", "")
    result = CliRunner().invoke(cli, ["serve", str(built.gguf), "--file", "BF16"])
    assert result.exit_code == 2
    assert result.output == (
        "Error: llama-cpp-python's server needs uvicorn, fastapi; run `pip install "
        "'llama-cpp-python[server]>=0.3.30'`, or build llama.cpp and pass --llama-cpp DIR\n"
    )


@contextmanager
def running(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A real server and its address, once it answers."""
    command = [sys.executable, "-m", "reap2gguf", "serve", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path[1:]])}
    with subprocess.Popen(
        [*command, "--port", "0", "--engine", "python"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            address = process.stdout.readline().split()[0]
            for line in process.stderr:
                if "Uvicorn running on" in line:
                    break
            yield process, address
        finally:
            process.kill()


def ask(address: str, **body: Any) -> Any:
    data = json.dumps({"messages": HELLO, **GREEDY, **body}).encode()
    request = urllib.request.Request(
        f"{address}/chat/completions", data, {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=60)


@needs_server
def test_the_real_server_gives_llama_cpps_own_answer_and_ends_on_a_signal(built: Bundle) -> None:
    model = built.gguf / "example-IQ4_K_M.gguf"
    with closing(Llama(str(model), n_ctx=256, verbose=False, **ONE_THREAD)) as llama:
        expected = llama.create_chat_completion(HELLO, **GREEDY)
    with running(model, "--context", 256, "--threads", 1) as (process, address):
        with urllib.request.urlopen(f"{address}/models", timeout=60) as answer:
            assert [entry["id"] for entry in json.load(answer)["data"]] == ["example-IQ4_K_M"]
        with ask(address, logprobs=True, top_logprobs=2) as answer:
            choice = json.load(answer)["choices"][0]
        assert choice["message"]["content"] == expected["choices"][0]["message"]["content"]
        assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
        with ask(address, response_format={"type": "json_object"}, max_tokens=200) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
        assert text.lstrip().startswith("{")
        with ask(address, stream=True, max_tokens=200) as answer:
            assert answer.readline().startswith(b"data: ")
            process.send_signal(signal.SIGTERM)
            with suppress(http.client.IncompleteRead, ConnectionError):
                answer.read()
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGTERM)
        assert "Finished server process" in errors
        assert "Traceback" not in errors


def refusal(request: urllib.request.Request) -> tuple[int, str]:
    """Status and message of a request that is refused."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    with caught.value as answer:
        return answer.code, str(json.load(answer)["error"]["message"])


@pytest.mark.slow
@needs_server
def test_the_real_server_answers_for_a_template_that_fails(built: Bundle, tmp_path: Path) -> None:
    template = (
        "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) "
        "%}{% endfor %}{% endfor %}{% elif messages[0].content == 'bad' %}{{ 1 + 'a' }}{% endif %}"
        "{{ messages[0].content }}"
    )
    model = altered(
        built.gguf / "example-BF16.gguf", tmp_path / "x.gguf", tokenizer__chat_template=template
    )
    with running(model, "--context", 256, "--threads", 1) as (_, address):
        for content, reason in (("bad", "unsupported operand"), ("loop", "more than")):
            for stream in (False, True):
                messages = [{"role": "user", "content": content}]
                data = json.dumps({"messages": messages, "stream": stream}).encode()
                request = urllib.request.Request(
                    f"{address}/chat/completions", data, {"Content-Type": "application/json"}
                )
                code, message = refusal(request)
                assert code == 400
                assert reason in message
        with ask(address) as answer:
            assert json.load(answer)["usage"]["prompt_tokens"] < 6  # "Hello" alone
        with ask(address, stream=True) as answer:
            assert b"content" in answer.read()
        for name, value in (("Host", "evil.example"), ("Origin", "https://evil.example")):
            asked = urllib.request.Request(f"{address}/models", headers={name: value})
            assert refusal(asked)[0] == 403
