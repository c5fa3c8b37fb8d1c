"""Run a bundle on this machine: chat with it, or start a server or llama.cpp's programs."""
