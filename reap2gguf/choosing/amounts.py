"""How much text a choice reads. Nothing is imported here: plans count by it too."""

from __future__ import annotations

ONE_IN = 8  # rows, of which one is held out
MOST_HELD_TOKENS = 2**15  # of the rows that are held out
CHUNK = 512  # tokens of a row of the text of another domain
MOST_CHUNKS = 32  # of that text
