"""Answers against llama-cpp-python called directly; programs against scripts that echo."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from llama_cpp import Llama

from reap2gguf import vendor
from reap2gguf.cli import cli
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.local import engine as engine_module
from reap2gguf.local import programs
from reap2gguf.local.chat import Answer, Conversation, converse, printable
from reap2gguf.local.engine import Engine
from reap2gguf.local.running import AnswerOptions, EngineOptions
from reap2gguf.resources import install_command
from tests.conftest import Bundle
from tests.local.altered import altered
from tests.test_vendor import VERSION, script
from tests.tiny import ONE_THREAD, REPOSITORY

ROOT = REPOSITORY
OPTIONS = EngineOptions(context=256, threads=1, gpu_layers=-1)
GREEDY = AnswerOptions(temperature=0.0, max_tokens=12)
ECHO = f'case "$1" in --version) {VERSION};; *) for w in "$@"; do echo "$w"; done; exit 7;; esac'


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vendor.VARIABLE, raising=False)


@pytest.fixture(scope="module")
def model(built: Bundle) -> Path:
    return built.gguf / "example-IQ4_K_M.gguf"


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with closing(Engine(model, OPTIONS)) as engine:
        yield engine


def directly(model: Path, messages: list[dict[str, str]]) -> str:
    with closing(Llama(str(model), n_ctx=256, verbose=False, **ONE_THREAD)) as llama:
        answer = llama.create_chat_completion(messages, temperature=0.0, max_tokens=12)
    return str(answer["choices"][0]["message"]["content"])


def run(*arguments: object, **more: str) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], **more)


FLAGS = ("--temperature", 0, "--tokens", 12, "--context", 256, "--threads", 1)


def test_an_answer_is_llama_cpps_own(built: Bundle, model: Path) -> None:
    expected = directly(
        model, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    )
    assert expected
    for given in ({"input": "Hello\n"}, {}):
        prompt = () if given else ("--prompt", "Hello")
        result = run("chat", built.gguf, *prompt, "--system", "Be brief.", *FLAGS, **given)
        assert result.exit_code == 0, result.output
        assert result.stdout == printable(expected) + "\n"
        first, last = result.stderr.splitlines()
        assert first == "example-IQ4_K_M.gguf; --file chooses another: BF16"
        assert last.startswith("(12 tokens, ")
        assert last.endswith(" tokens/s)")


def test_a_conversation_remembers_its_messages(engine: Engine, model: Path) -> None:
    conversation = Conversation(engine, GREEDY)
    first = conversation.ask("Hello", lambda text: None)
    second = conversation.ask("And then?", lambda text: None)
    asked = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And then?"},
    ]
    assert second.text == directly(model, asked)
    conversation.clear()
    assert conversation.ask("Hello", lambda text: None).text == first.text


def test_the_same_seed_gives_the_same_answer(engine: Engine) -> None:
    options = AnswerOptions(temperature=1.5, max_tokens=12, seed=5)
    answers = {Conversation(engine, options).ask("Hello", str).text for _ in range(2)}
    other = Conversation(engine, replace(options, seed=6)).ask("Hello", str).text
    assert len(answers) == 1
    assert other not in answers


def test_ctrl_c_stops_an_answer_and_keeps_its_beginning(engine: Engine) -> None:
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    conversation = Conversation(engine, AnswerOptions(temperature=0.0, max_tokens=100))
    answer = conversation.ask("Hello", write)
    assert answer.was_stopped
    assert len(written) == 4
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(written)}


def test_a_question_without_room_is_forgotten(engine: Engine) -> None:
    conversation = Conversation(engine, GREEDY)
    with pytest.raises(UsageError, match="exceed context window of 256; pass a larger --context"):
        conversation.ask("word " * 400, lambda text: None)
    assert conversation.messages == []
    assert conversation.ask("Hello", lambda text: None).text


@pytest.mark.parametrize(("context", "n_words"), [(9, 7), (257, 130)])
def test_a_context_that_is_no_multiple_of_llama_cpps_step_is_one(
    context: int, n_words: int, model: Path
) -> None:
    with closing(Engine(model, EngineOptions(context, 1, -1))) as engine:
        assert engine.context == -(-context // 256) * 256
        conversation = Conversation(engine, AnswerOptions(temperature=0.0))
        answer = conversation.ask("word " * n_words, lambda text: None)
        assert answer.n_tokens
        with pytest.raises(UsageError, match=f"exceed context window of {engine.context}"):
            conversation.ask("word " * 600, lambda text: None)


def test_text_of_a_model_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2Jb\n\tc\x07é") == "a\\x1b[2Jb\n\tc\\x07é"


def test_a_broken_file_is_one_line(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    result = run("chat", broken, "--prompt", "x", "--engine", "python")
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    with pytest.raises(ArtifactError, match=r"llama\.cpp cannot run it"):
        Engine(model.parent / "imatrix.gguf", OPTIONS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 9999),
        ("expert_count", 0),
        ("expert_count", 5000),
        ("expert_used_count", 0),
        ("expert_used_count", 99),
    ],
)
def test_counts_at_which_llama_cpp_would_end_the_process_are_refused(
    key: str, value: int, model: Path, tmp_path: Path
) -> None:
    raw = model.read_bytes()
    name = f"qwen3moe.{key}".encode()
    at = raw.index(name) + len(name) + 4
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(raw[:at] + value.to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(ArtifactError, match=f"broken.gguf: qwen3moe.expert_used|{key} is {value}"):
        Engine(broken, OPTIONS)


@pytest.mark.parametrize("when", ["load", "answer"])
def test_a_process_that_llama_cpp_ends_is_one_line(
    when: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it: the header is checked before, here it is not."""
    monkeypatch.setattr(engine_module, "check_header", lambda path, header: None)
    values = {
        "load": {"arch__expert_used_count": 99},
        "answer": {"arch__attention__layer_norm_rms_epsilon": -1.0},
    }
    path = altered(model, tmp_path / "x.gguf", **values[when])
    result = run("chat", path, "--prompt", "x", "--engine", "python", "--context", 256)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {path}: llama.cpp ended while it ran this file (SIGABRT: ")
    assert "GGML_ASSERT(" in line


def test_a_process_that_is_killed_is_one_line(model: Path) -> None:
    with closing(Engine(model, OPTIONS)) as engine:
        number = engine._process._process.pid
        os.kill(number, signal.SIGSTOP)  # else it may have said everything before it is killed
        timer = threading.Timer(0.3, os.kill, (number, signal.SIGKILL))
        timer.start()
        with pytest.raises(ArtifactError, match=r"llama\.cpp ended .* \(SIGKILL\)"):
            list(engine.pieces([{"role": "user", "content": "Hello"}], GREEDY))
        timer.join()


class Scripted:
    """What a user types, and what is shown."""

    def __init__(self, *typed: str | type[BaseException]) -> None:
        self.typed = list(typed)
        self.shown: list[str] = []
        self.asked: list[str] = []

    def read(self, prompt: str) -> str:
        self.shown.append(prompt)
        line = self.typed.pop(0)
        if isinstance(line, str):
            return line
        raise line

    def ask(self, text: str, write: Any) -> Answer:
        self.asked.append(text)
        return Answer("yes", 1, 0.0)

    def clear(self) -> None:
        self.asked.append("cleared")

    def run(self) -> list[str]:
        converse(self, self.read, lambda text: None, self.shown.append)  # type: ignore[arg-type]
        assert not self.typed
        return self.asked


def test_ctrl_c_at_the_prompt_stays_and_names_the_way_out() -> None:
    scripted = Scripted(KeyboardInterrupt, "Hello", KeyboardInterrupt, EOFError)
    assert scripted.run() == ["Hello"]
    assert scripted.shown.count("\nCtrl-D or /exit quits") == 2


def test_a_text_of_several_lines_is_one_question() -> None:
    scripted = Scripted(
        '"""', "def f():", "    return 1", "", '"""', '"""one line"""', '  """two', 'lines"""  ',
        '"""dropped', KeyboardInterrupt, "/clear", '"""/exit', 'now"""', "/exit",
    )  # fmt: skip
    assert scripted.run() == [
        "def f():\n    return 1", "one line", "two\nlines", "cleared", "/exit\nnow",
    ]  # fmt: skip
    assert scripted.shown[:5] == ["> ", "... ", "... ", "... ", "... "]
    assert Scripted('"""open', EOFError).run() == []


def test_an_empty_stdin_is_reported(built: Bundle) -> None:
    result = run("chat", built.gguf, input="  \n")
    assert result.exit_code == 2
    assert "is empty; pass --prompt TEXT" in result.output


def test_on_a_terminal_it_answers_until_exit(model: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "reap2gguf", "chat", str(model), *map(str, FLAGS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        os.close(slave)
        os.write(master, b"Hello\n/clear\n/what\n/exit\n")
        assert process.stderr is not None
        errors = process.stderr.read()
        assert process.wait(300) == 0
        shown = os.read(master, 65536).decode()
    os.close(master)
    assert errors.splitlines()[0].startswith("Ctrl-C stops an answer")
    assert "(12 tokens" in errors
    assert "new conversation\n" in errors
    assert "Traceback" not in errors
    answer = directly(model, [{"role": "user", "content": "Hello"}])
    assert answer.splitlines()[0] in shown.replace("\r\n", "\n")


def external(command: list[object], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), vendor.VARIABLE: str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "reap2gguf", *map(str, command)], capture_output=True, text=True,
        env=environment, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def test_llama_cli_and_llama_server_receive_the_options(bundle: Bundle, tmp_path: Path) -> None:
    for name in ("llama-cli", "llama-server"):
        script(tmp_path / "own" / name, ECHO)
    (bundle.gguf / "mmproj-example-F16.gguf").write_text("")
    done = external(
        ["chat", bundle.gguf, "--file", "BF16", "--prompt", "Why -- so?", "--seed", 3,
         "--system", "Be brief.", *FLAGS], tmp_path / "own",
    )  # fmt: skip
    assert done.returncode == 7, "the program's own exit code"
    assert done.stdout.splitlines() == [
        "--model", str(bundle.gguf / "example-BF16.gguf"), "--jinja",
        "--ctx-size", "256", "--threads", "1", "--temp", "0", "--system-prompt", "Be brief.",
        "--predict", "12", "--seed", "3", "--prompt", "Why -- so?", "--single-turn",
        "--no-display-prompt",
    ]  # fmt: skip
    done = external(
        ["serve", bundle.gguf, "--port", 8123, "--parallel", 4, "--threads", 2, "--gpu-layers", 9],
        tmp_path / "own",
    )
    assert done.returncode == 7
    assert done.stdout.splitlines() == [
        f"http://127.0.0.1:8123/v1  example-IQ4_K_M ({tmp_path}/own/llama-server)",
        "--model", str(bundle.gguf / "example-IQ4_K_M.gguf"), "--mmproj",
        str(bundle.gguf / "mmproj-example-F16.gguf"), "--alias", "example-IQ4_K_M", "--host",
        "127.0.0.1", "--port", "8123", "--jinja", "--parallel", "4", "--ctx-size", "32768",
        "--threads", "2", "--gpu-layers", "9",
    ]  # fmt: skip


def test_a_signal_goes_to_the_program(built: Bundle, tmp_path: Path) -> None:
    wait = f'case "$1" in --version) {VERSION};; *) echo ready; exec sleep 3000;; esac'
    script(tmp_path / "own" / "llama-server", wait)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "reap2gguf", "serve", str(built.gguf), "--llama-cpp"]
    with subprocess.Popen(
        [*command, str(tmp_path / "own")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:8080/v1")
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(300) == -signal.SIGTERM


def test_a_port_is_known_before_llama_server_takes_over(built: Bundle, tmp_path: Path) -> None:
    script(tmp_path / "own" / "llama-server", ECHO)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = external(["serve", built.gguf, "--port", port], tmp_path / "own")
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"Error: 127.0.0.1:{port}: cannot listen there (Address alr" in done.stderr
    done = external(["serve", built.gguf, "--port", 0, "--host", "::1"], tmp_path / "own")
    said = done.stdout.splitlines()
    port = int(said[said.index("--port") + 1])
    assert port > 0
    assert said[0].startswith(f"http://[::1]:{port}/v1  ")


def test_the_error_says_what_to_install(
    built: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "is_installed", lambda: False)
    for command, name, extra in (
        ("chat", "llama-cli", "llama"),
        ("serve", "llama-server", "serve"),
    ):
        result = run(command, built.gguf)
        assert result.exit_code == 2
        assert "llama-cpp-python is not installed, and no " + name in result.output
        assert f"run `{install_command(extra)}`" in result.output
    monkeypatch.setattr(programs, "is_installed", lambda: True)
    result = run("serve", built.gguf, "--engine", "llama.cpp")
    assert "no llama-server was found on PATH, and LLAMA_CPP_DIR is not set" in result.output
    script(tmp_path / "own" / "llama-server", "exit 9")
    result = run("chat", built.gguf, "--llama-cpp", tmp_path / "own", "--prompt", "x", *FLAGS)
    assert result.exit_code == 2, "what was asked for and does not run is no silent matter"
    script(tmp_path / "own" / "llama-server", VERSION)
    result = run("chat", built.gguf, "--llama-cpp", tmp_path / "own", "--prompt", "x", *FLAGS)
    assert result.exit_code == 0, result.output
    assert "has no llama-cli; llama-cpp-python runs the model" in result.stderr
    script(tmp_path / "own" / "llama-server", "exit 9")
    result = run("serve", built.gguf, "--llama-cpp", tmp_path / "own")
    assert result.exit_code == 2
    assert "--version: failed with 9" in result.output
