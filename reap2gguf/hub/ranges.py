"""Parts of files on the Hub, without the rest: one request per range, repeated while it fails.

All reads are of one commit, so that a file cannot change between two of them.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from io import SEEK_CUR, SEEK_END, SEEK_SET, RawIOBase
from itertools import islice
from typing import TYPE_CHECKING

from reap2gguf.errors import SourceError
from reap2gguf.hub.retry import Note, Sleep, ignore_note, model_retry

if TYPE_CHECKING:
    from reap2gguf.hub.snapshot import HubFile

_BLOCK = 2**21  # bytes
_MOST_KEPT = 64  # blocks of a file, so 128 MiB
_AHEAD = 6  # blocks that are fetched while an earlier one is read
_MOST_REQUESTS = 8  # at once, of a file


class HubRanges:
    """The files of one commit of a repository. Threads may share it."""

    def __init__(
        self, repository: str, commit: str, note: Note = ignore_note, sleep: Sleep = time.sleep
    ) -> None:
        self.repository, self.commit = repository, commit
        self._retry = model_retry(repository, commit, note, sleep)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file.

        Raises SourceError if the Hub refuses, cannot be reached in five tries, or sends other bytes
        than were asked for.
        """
        if begin == end:
            return b""
        found = self._retry.call(partial(self._request, name, begin, end))
        if len(found) != end - begin:
            raise SourceError(
                f"{self.repository}: {name}: got {len(found):,} bytes from byte {begin:,} on, "
                f"expected {end - begin:,}; try again later"
            )
        return found

    def _request(self, name: str, begin: int, end: int) -> bytes:
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        wanted = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        headers = build_hf_headers() | wanted
        url = hf_hub_url(self.repository, name, revision=self.commit)
        limit = constants.HF_HUB_DOWNLOAD_TIMEOUT  # without data; the session has no limit
        found = bytearray()
        with get_session().stream("GET", url, headers=headers, timeout=limit) as answer:
            hf_raise_for_status(answer)
            for block in answer.iter_bytes():
                found += block
                if len(found) >= end - begin:  # a server may ignore ranges
                    break
        if answer.status_code != 206 and begin:
            raise ValueError("it does not send parts of files")
        return bytes(found[: end - begin])


class HubBlocks:
    """One file of the Hub, read in blocks of which the last ones are kept.

    Blocks are fetched by several requests at once, ahead of who reads. Threads may share it.
    Memory: 128 MiB, and what a read returns.
    """

    def __init__(self, ranges: HubRanges, file: HubFile) -> None:
        self.file = file
        self.commit = ranges.commit
        self._ranges = ranges
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(_MOST_REQUESTS)
        self._kept: OrderedDict[int, Future[bytes]] = OrderedDict()

    def read(self, begin: int, end: int, soon: int | None = None) -> bytearray:
        """Bytes [begin, end); those up to `soon` are fetched meanwhile, as far as is sensible.

        Raises SourceError as `HubRanges.read` does, also for bytes that the file does not have.
        """
        if not 0 <= begin <= end <= self.file.n_bytes:
            raise SourceError(
                f"{self._ranges.repository}: {self.file.name}: has {self.file.n_bytes:,} bytes, "
                f"not {end:,}"
            )
        found = bytearray()
        for number, block in self._in_order(begin, end, max(end, soon or end)):
            first = number * _BLOCK
            found += block[max(begin - first, 0) : end - first]
        return found

    def _in_order(self, begin: int, end: int, soon: int) -> Iterator[tuple[int, bytes]]:
        """The blocks of a range; a few more are under way all the time."""
        numbers = range(begin // _BLOCK, -(-end // _BLOCK))
        ahead = iter(range(numbers.start, -(-soon // _BLOCK)))
        waiting: deque[Future[bytes]] = deque(map(self._block, islice(ahead, _AHEAD)))
        for number in numbers:
            block = waiting.popleft().result()
            waiting.extend(map(self._block, islice(ahead, 1)))
            yield number, block

    def _block(self, number: int) -> Future[bytes]:
        """A block that is here or under way."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            block: Future[bytes] = Future()
            self._kept[number] = block
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        # a daemon: neither Ctrl-C nor the end of the program waits for the network
        threading.Thread(target=self._fetch, args=(number, block), daemon=True).start()
        return block

    def _fetch(self, number: int, block: Future[bytes]) -> None:
        begin = number * _BLOCK
        end = min(begin + _BLOCK, self.file.n_bytes)
        try:
            with self._slots:
                block.set_result(self._ranges.read(self.file.name, begin, end))
        except BaseException as error:  # noqa: BLE001 - whatever it is, who reads raises it
            with self._lock, suppress(KeyError):
                del self._kept[number]  # a later read tries again
            block.set_exception(error)


class HubStream(RawIOBase):
    """The bytes of such a file in order, for who reads a header; wrap it in a BufferedReader."""

    def __init__(self, blocks: HubBlocks) -> None:
        self._blocks = blocks
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        """Go to a byte; what was read before lies in memory, as far as its bound allows."""
        bases = {SEEK_SET: 0, SEEK_CUR: self._position, SEEK_END: self._blocks.file.n_bytes}
        self._position = max(0, bases[whence] + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._blocks.file.n_bytes)
        count = end - self._position
        buffer[:count] = self._blocks.read(self._position, end)
        self._position = end
        return count
