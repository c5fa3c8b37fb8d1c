"""Hostile chat templates: each is stopped by its limit, reported in one line, and leaves nothing.

Only the limit under test is small, so that no test depends on the speed of the machine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from reap2gguf.errors import BadSampleError, CalibrationError, DependencyError
from reap2gguf.tokenizer import templates
from reap2gguf.tokenizer.template_worker import HEADER, Answer
from reap2gguf.tokenizer.templates import ChatTemplate, Limits

LIMITS = Limits(cpu_seconds=60, wall_seconds=300, memory_bytes=128 * 2**20, output_bytes=2**22)
SHORT = replace(LIMITS, cpu_seconds=0.3)
CHAT = [{"role": "user", "content": "hello"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

TIME = {
    "loops": ENDLESS,
    "loops in an expression": "{{ range(99999) | map('string') | join | length }}" * 2000,
    "loops in a macro": "{% macro m() %}" + ENDLESS + "{% endmacro %}{{ m() }}",
    "a tree of macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "a tree of loops": "{% for x in [[[[[[[[[[1] * 9] * 9] * 9] * 9] * 9] * 9] * 9] * 9] * 9] "
    "recursive %}{% if x is iterable %}{{ loop(x) }}{% endif %}{% endfor %}",
    "a power": "{{ 7 ** (7 ** 9) }}",
    "a power made of variables": "{% set n = messages | length + 6 %}{{ n ** (n ** 9) }}",
    "a division of giants": "{% set n = (messages | length + 2) ** 2000000 %}"
    "{{ n ** 3 // (n + 1) % 97 }}",
    "a search for what is not there": "{% set a = 'a' * 2000000 %}{{ a.find('a' * 999999 + 'b') }}"
    "{% for i in range(9999) %}{{ a.count('ab' * 9) }}{% endfor %}",
    "replacing": "{% set a = 'a' * 9999 %}{% for i in range(9999) %}{{ a.replace('a', 'bb')[:0] }}"
    "{% for j in range(99) %}{{ a.replace('a', 'bb')[:0] }}{% endfor %}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=99999, min=9999, max=99999)[:1] }}",
    "searching for links": "{% for i in range(99999) %}"
    "{{ ('<a@b.c> ' * 999 ~ messages[0].content) | urlize | length }}{% endfor %}",
    "a template of one name after another": "{% set a = b %}" * 60000,
    "titles": "{% set a = 'a b ' * 9999 %}{% for i in range(99999) %}{{ (a | title)[:0] }}"
    "{% endfor %}",
    "parentheses in a search": "{% for i in range(9999) %}"
    "{{ ('<' * 99999 + messages[0].content) | striptags | length }}{% endfor %}",
}
MEMORY = {
    "a constant": "{{ 'a' * 10 ** 10 }}",
    "a constant list": "{{ [0] * 10 ** 9 }}",
    "a width": "{{ '%0999999999d' % 1 }}",
    "a width of a word": "{{ '{:>999999999}'.format('a') }}",
    "center": "{{ messages[0].content | center(10 ** 9) }}",
    "ljust": "{{ messages[0].content.ljust(10 ** 10) }}",
    "indent": "{{ ('a\\n' * 9999) | indent(999999) }}",
    "doubling": "{% set ns = namespace(a='aa') %}{% for i in range(99) %}"
    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(a=[1, 2]) %}{% for i in range(99) %}"
    "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "nesting": "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}"
    "{% set ns.a = [ns.a, 'a' * 99999 ~ i] %}{% endfor %}",
    "squaring": "{% set ns = namespace(a='a' * 999) %}{% for i in range(9) %}"
    "{% set ns.a = ns.a.replace('a', ns.a) %}{% endfor %}",
    "joining": "{{ (range(99999) | list * 99) | join('a' * 999) }}",
    "JSON": "{{ range(99999) | list | tojson(indent=99999) }}",
    "a fraction of zeros": "{{ '%.999999999f' % 1 }}",
}
LENGTH = {
    "a long text": "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "many letters": "{% for i in range(99) %}"
    "{% for i in range(5000) %}{{ 'a' * 20 }}{% endfor %}{% endfor %}",
    "wide letters": "{{ 'ᚠ' * 2 ** 21 }}",
}
FORBIDDEN = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by filter": "{{ ('' | attr('__class__')).mro() }}",
    "classes by item": "{{ ''['__class__']['__base__'] }}",
    "globals of a function": "{{ raise_exception.__globals__['json'] }}",
    "globals of a macro": "{{ lipsum.__globals__.os.system('id') }}",
    "globals of a template": "{{ self.__init__.__globals__ }}",
    "the date's class": "{{ strftime_now.__self__.year }}",
    "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "format_map": "{{ '{a.__class__.__base__}'.format_map({'a': 1}) }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "changing a message": "{{ messages.append(1) }}",
    "changing a dict": "{{ messages[0].update(a=1) }}",
    "private names": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "private names at once": "{{ namespace(__init__=1) }}",
    "a generator's frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
}
REFUSED = {
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'base' %}",
    "open": "{{ open('/etc/passwd').read() }}",
    "a range": "{{ range(10 ** 9) | list }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a loop without end": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a list in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns | tojson }}",
    "a block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "deep parentheses": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "deep lists": "{{ " + "[" * 50000 + "]" * 50000 + " }}",
    "deep loops": "{% for a in b %}" * 3000,
    "deep negation": "{{ " + "not " * 50000 + "1 }}",
    "a long sum": "{{ 1" + " + x" * 9999 + " }}",
    "a syntax error": "{% if %}",
    "a division by zero": "{{ 1 / 0 }}",
    "a long message": "{{ raise_exception('long ' * 99999) }}",
    "a message of escapes": "{{ raise_exception('\\x1b[2J\\x07\\r\\n\\u202e red') }}",
    "no message": "{{ raise_exception('') }}",
    "a huge number as text": "{{ 10 ** 5000 }}",
    "a codec": "{{ messages[0].content.encode('punycode') }}",
}
WHOLE = {
    "used more than 0.3 s of processor time": TIME,
    "used more than 128 MiB of memory": MEMORY,
    "wrote more than 4 MiB": LENGTH,
    "does something forbidden": FORBIDDEN,
    "refuses it": REFUSED,
}


def is_running(process_id: int) -> bool:
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "State:\tZ" not in status  # ended, and not yet waited for


def seconds_of_children() -> float:
    """The processor time of processes that have ended and were waited for."""
    times = os.times()
    return times.children_user + times.children_system


def seconds_of(process_id: int) -> float:
    """The processor time of a running process."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# of each kind every second one is in the plain run: a worker is started for each
@pytest.mark.parametrize(
    ("template", "what"),
    [
        pytest.param(template, what, id=name, marks=pytest.mark.slow if number % 2 else ())
        for what, table in WHOLE.items()
        for number, (name, template) in enumerate(table.items())
    ],
)
def test_harm_ends_soon_and_in_one_line(template: str, what: str) -> None:
    chat = ChatTemplate(template, {}, SHORT if "processor time" in what else LIMITS)
    chat._process = chat._start()
    worker = chat._process._process
    before = seconds_of_children()
    with pytest.raises(CalibrationError) as caught:
        chat.render(CHAT)
    assert seconds_of_children() - before < 5
    message = str(caught.value)
    assert what in message
    assert message.endswith('; pass samples of plain text (a "text" field each), or another '
                            "--calibration")  # fmt: skip
    assert message.isprintable()
    assert len(message) < 500
    if "the chat template refuses it" in message:  # its process answers the next request
        assert isinstance(caught.value, BadSampleError)
        assert chat._process._process is worker
        assert is_running(worker.pid)
        chat.close()
    else:
        assert not isinstance(caught.value, BadSampleError)
    assert worker.returncode is not None
    assert not is_running(worker.pid)


def test_the_limits_that_a_build_has() -> None:
    assert Limits() == Limits(3.0, 10.0, 512 * 2**20, 64 * 2**20)
    # a busy machine could need more than ten seconds for three of processor time
    limits = replace(Limits(), wall_seconds=300)
    with pytest.raises(CalibrationError, match=r"used more than 3 s of processor time"):
        ChatTemplate(ENDLESS, {}, limits).render(CHAT)


def test_the_limit_is_each_samples_own() -> None:
    work = "{% for a in range(400) %}{% for b in range(999) %}{% endfor %}{% endfor %}"
    with ChatTemplate(work, {}, replace(LIMITS, cpu_seconds=1)) as chat:
        chat._process = chat._start()
        worker = chat._process._process.pid
        while seconds_of(worker) < 2:
            assert chat.render(CHAT) == ""
        assert chat._process._process.pid == worker


def test_memory_stays_bounded() -> None:
    program = """
import resource
from reap2gguf.tokenizer.templates import ChatTemplate, Limits
from reap2gguf.errors import BadSampleError, CalibrationError
for template in TEMPLATES:
    try:
        ChatTemplate(template, {}, Limits(memory_bytes=2**27)).render([])
    except CalibrationError:
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    whole = f"TEMPLATES = {list(MEMORY.values())!r}\n{program}"
    found = subprocess.run([sys.executable, "-c", whole], check=True, capture_output=True)
    kilobytes = [int(line) for line in found.stdout.split()]
    assert len(kilobytes) == len(MEMORY)
    assert max(kilobytes) * 1024 < 2**27 + 2**26


def test_what_a_worker_has_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    with ChatTemplate("", {}, LIMITS) as chat:
        assert chat.render(CHAT) == ""
        assert chat._process is not None
        folder = Path(f"/proc/{chat._process._process.pid}")
        limits = {line[:25].strip(): line[26:].split()[:2] for line in
                  (folder / "limits").read_text().splitlines()}  # fmt: skip
        assert limits["Max open files"] == ["0", "0"]
        assert limits["Max file size"] == ["0", "0"]
        assert limits["Max processes"] == ["0", "0"]
        assert limits["Max core file size"] == ["0", "0"]
        soft, hard = map(int, limits["Max address space"])
        assert soft == hard < 2**28
        assert "A_SECRET" not in (folder / "environ").read_text()
        assert len(list((folder / "fd").iterdir())) == 3


def test_the_worker_needs_nothing_heavy() -> None:
    program = (
        "import sys; import reap2gguf.tokenizer.template_worker as worker; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'reap2gguf.errors') "
        "if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert found.stdout.strip() == b"[]"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_is_killed(sent: signal.Signals) -> None:
    with ChatTemplate("{{ messages[0].content }}", {}) as chat:
        assert chat.render(CHAT) == "hello"
        assert chat._process is not None
        chat._process._process.send_signal(sent)
        with pytest.raises(CalibrationError, match=rf"process was killed \({sent.name}\); pass"):
            chat.render([{"content": "x" * 2**24}])
        assert chat.render(CHAT) == "hello"


def test_a_worker_that_is_killed_at_work() -> None:
    chat = ChatTemplate(ENDLESS, {}, Limits(cpu_seconds=60, wall_seconds=60))
    chat._process = chat._start()
    threading.Timer(0.3, chat._process._process.kill).start()
    with pytest.raises(CalibrationError, match=r"killed \(SIGKILL\)"):
        chat.render(CHAT)


def test_a_worker_that_is_stopped() -> None:
    chat = ChatTemplate("", {}, LIMITS)
    assert chat.render(CHAT) == ""
    assert chat._process is not None
    worker = chat._process._process
    for content in ("x", "x" * 2**24):  # more than the socket holds: sending is bounded, too
        if chat._process is None:
            chat._process = chat._start()
        worker = chat._process._process
        worker.send_signal(signal.SIGSTOP)
        chat._process._limits = replace(LIMITS, wall_seconds=0.3)
        with pytest.raises(CalibrationError, match=r"took more than 0\.3 s; pass"):
            chat.render([{"content": content}])
        assert not is_running(worker.pid)


@pytest.mark.parametrize(
    "answer",
    [
        HEADER.pack(Answer.TEXT, 2**32 - 1),
        HEADER.pack(99, 0),
        HEADER.pack(Answer.READY, 3) + b"abc",
        HEADER.pack(Answer.TEXT, 1) + b"\xff",
        HEADER.pack(Answer.REFUSED, 2**31),
    ],
)
def test_a_worker_that_lies(answer: bytes) -> None:
    chat = ChatTemplate("", {}, LIMITS)
    assert chat.render(CHAT) == ""
    assert chat._process is not None
    ours, theirs = socket.socketpair()
    chat._process._socket.close()
    chat._process._socket = ours
    theirs.sendall(answer)
    with theirs, ours, pytest.raises(CalibrationError, match="gave a broken answer"):
        chat.render(CHAT)


def test_a_worker_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_BOOT", "raise SystemExit(7)")
    with pytest.raises(
        DependencyError, match=r"does not start \(.*has ended \(exit 7\)\); reinstall"
    ):
        ChatTemplate("", {}).render(CHAT)


def test_no_worker_outlives_its_parent() -> None:
    program = (
        "import os, signal; from reap2gguf.tokenizer.templates import ChatTemplate; "
        "chat = ChatTemplate('', {}); chat.render([]); "
        "print(chat._process._process.pid, flush=True); "
    )
    for end in ("raise SystemExit", "os.kill(os.getpid(), signal.SIGKILL)"):
        ended = subprocess.run([sys.executable, "-c", program + end], capture_output=True)
        worker = int(ended.stdout)
        deadline = time.monotonic() + 60
        while is_running(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(worker)


def test_a_template_that_nobody_closes_is_closed() -> None:
    chat = ChatTemplate("", {})
    chat.render(CHAT)
    assert chat._process is not None
    worker = chat._process._process.pid
    del chat
    assert not is_running(worker)
