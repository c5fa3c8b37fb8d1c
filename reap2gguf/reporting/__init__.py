"""`reap2gguf report`: one self-contained HTML page about a finished bundle."""
