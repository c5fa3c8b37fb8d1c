"""Run a bundle on this machine: chat in this process, or start a server or llama.cpp's programs."""
