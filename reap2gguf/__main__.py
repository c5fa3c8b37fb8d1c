"""The program `reap2gguf`, also as `python -m reap2gguf`: the command line, where it can run."""

import os
import signal
import sys

from reap2gguf import without_posix

_INTERRUPTED = 130  # the exit code


def main() -> None:
    """Run the command line; on a system without POSIX modules, say so in one line and exit 2."""
    _open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)  # until the command line has been imported
    if problem := without_posix():
        print(f"Error: {problem}", file=sys.stderr)
        sys.exit(2)
    from reap2gguf.cli import main as run

    run()


def _end(number: int, frame: object) -> None:
    """Nothing is begun that would have to be ended in order."""
    try:
        os.write(2, b"Interrupted.\n")
    finally:
        os._exit(_INTERRUPTED)


def _open_closed_streams() -> None:
    """Open the standard streams that were closed: other files would get their numbers.

    Results that go to a closed stdout are an error, as they would be lost: writing to it fails.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if nothing == number:
                os.set_inheritable(number, True)
            else:
                os.dup2(nothing, number)
                os.close(nothing)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


if __name__ == "__main__":
    main()
