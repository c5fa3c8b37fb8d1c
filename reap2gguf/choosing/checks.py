"""Whether observations leave out the rows that candidates are measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.errors import ArtifactError

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.artifacts.texts import ObservationRows


def check_unseen(seen: Observations, rows: ObservationRows, where: str) -> None:
    """Raise ArtifactError unless observations were made on `rows`, those that are not held out.

    Of observations of other rows it is not known whether they read the ones that are held out.
    """
    if seen.calibration_sha256 != rows.sha256:
        raise ArtifactError(
            f"{where}: was observed on {seen.n_rows:,} rows of {seen.calibration!r}, expected the "
            f"{len(rows.rows):,} rows of {rows.label!r} that are not held out to choose a method; "
            "pass the --calibration, --samples, --max-length and --seed of a `choose` or a build "
            "with --method auto that made it, or leave it out"
        )
