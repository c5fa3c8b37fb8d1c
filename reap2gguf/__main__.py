"""`python -m reap2gguf` is the command line."""

from reap2gguf.cli import main

if __name__ == "__main__":
    main()
