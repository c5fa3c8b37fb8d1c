"""A pass over a model in several processes, perhaps on several machines.

The first process writes the output, and it alone checks that it can. A process on another machine
may not have the output's folder: it makes one for its own progress, and removes it at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.atomic import make_folder
from reap2gguf.errors import OutputError
from reap2gguf.machine import processes
from reap2gguf.options import check_path
from reap2gguf.outputs import drop_states, output_file

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint


class Peers:
    """This process and the others of a pass that writes `output`; alone without torchrun.

    Connects to the others. Raises UsageError or OutputError for an output that cannot be written.
    """

    def __init__(self, output: object) -> None:
        self._is_first, self._is_alone = processes().is_first, processes().size == 1
        self.output = output_file(output) if self._is_first else check_path("output", output)
        self._made: Path | None = None
        if not self._is_alone:
            from reap2gguf.observing.compute.ranks import join

            join()

    def check_same_model(self, checkpoint: Checkpoint) -> None:
        """Raises PeerError, in all processes, if they see different checkpoints."""
        if not self._is_alone:
            from reap2gguf.observing.compute.ranks import check_same_model

            check_same_model(checkpoint.fingerprint())

    def make_folder(self) -> None:
        """Make the output's folder on another machine. The first process has checked its own."""
        folder = self.output.parent
        if self._is_first or folder.is_dir():
            return
        try:
            make_folder(folder)
        except OutputError:
            return  # then no progress is kept, as the pass reports
        self._made = folder

    def end(self, save: Callable[[], None]) -> None:
        """Write the output in the first process; then all drop the progress that they kept."""
        if self._is_first:
            save()
            drop_states(self.output)
        if self._is_alone:
            return
        from reap2gguf.observing.compute.ranks import join

        join().total([0])  # until the output is written
        if not self._is_first:
            drop_states(self.output)
        if self._made is not None:
            with suppress(OSError):  # not empty
                self._made.rmdir()
