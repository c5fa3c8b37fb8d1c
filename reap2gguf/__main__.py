"""The program `reap2gguf`, also as `python -m reap2gguf`: the command line, where it can run."""

import sys

from reap2gguf import without_posix


def main() -> None:
    """Run the command line; on a system without POSIX modules, say so in one line and exit 2."""
    if problem := without_posix():
        print(f"Error: {problem}", file=sys.stderr)
        sys.exit(2)
    from reap2gguf.cli import main as run

    run()


if __name__ == "__main__":
    main()
