"""Every error this program raises for its user.

    Reap2ggufError                  exit code 2
    ├── UsageError                  arguments that contradict each other or the model
    ├── SourceError                 the model cannot be found or fetched
    ├── CheckpointError             a checkpoint's files are broken or incomplete
    │   └── UnknownTensorError      a stored tensor no rule explains
    ├── UnsupportedModelError       a model, or a value in its config, that is not implemented
    ├── CalibrationError            text or samples that cannot become rows of tokens
    ├── ObservationError            a sweep whose numbers cannot be trusted
    ├── PeerError                   another process of the same run has ended
    ├── RecipeError                 a recipe that is wrong in itself or for this model
    ├── ArtifactError               a GGUF, imatrix or observations file that is broken
    ├── DependencyError             a library that is missing or too old
    ├── OutputError                 the output cannot be written
    ├── PublishError                the Hub does not take what is published
    └── VerificationError           exit code 1: what was written is not what was planned

A message says where, what was found, what was expected and what to do.
"""


class Reap2ggufError(Exception):
    """The base of every error that the command line reports in one line."""

    exit_code = 2


class UsageError(Reap2ggufError):
    """Arguments contradict each other or the model, such as more experts kept than there are."""


class SourceError(Reap2ggufError):
    """The model named on the command line cannot be found or fetched."""


class CheckpointError(Reap2ggufError):
    """A checkpoint's files are broken, incomplete or disagree with each other."""


class UnknownTensorError(CheckpointError):
    """A stored tensor has a name that no rule of its architecture explains."""


class UnsupportedModelError(Reap2ggufError):
    """The architecture, or a value in its config, is one this program does not implement."""


class CalibrationError(Reap2ggufError):
    """Calibration text or samples cannot be read, or do not fill one row of tokens."""


class ObservationError(Reap2ggufError):
    """Too many rows of a sweep were not finite for its sums to be trusted."""


class PeerError(Reap2ggufError):
    """Another process of the same run ended before its time."""


class RecipeError(Reap2ggufError):
    """A recipe is malformed, or one of its rules does not fit the model."""


class ArtifactError(Reap2ggufError):
    """A GGUF, imatrix or observations file is truncated, malformed or of another model."""


class DependencyError(Reap2ggufError):
    """A library that the task needs is missing, too old, or cannot be loaded."""


class OutputError(Reap2ggufError):
    """The output folder cannot be written, or holds something that must not be replaced."""


class PublishError(Reap2ggufError):
    """The Hub cannot be reached, or does not take what is to be published."""


class VerificationError(Reap2ggufError):
    """What was written differs from what was planned; the violations are listed."""

    exit_code = 1

    def __init__(self, violations: list[str], advice: str = "") -> None:
        self.violations = violations
        count = len(violations)
        found = f"verification found {count} violation{'s' if count != 1 else ''}"
        super().__init__(f"{found}; {advice}" if advice else found)
