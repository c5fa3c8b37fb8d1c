"""Every error that this program raises for its user.

    Reap2ggufError                  exit code 2
    ├── UsageError                  arguments contradict each other or the model
    │   └── ParameterError          a parameter has a value that it cannot have
    ├── SourceError                 the model cannot be found or fetched
    ├── CheckpointError             a checkpoint's files are broken or incomplete
    │   └── UnknownTensorError      a stored tensor matches no rule
    ├── UnsupportedModelError       a model or a config value is not implemented
    ├── CalibrationError            text or samples cannot become rows of tokens
    │   └── BadSampleError          one sample cannot be used; a few of them are skipped
    ├── ObservationError            the results of a calibration pass are not finite
    ├── EvaluationError             a task or a text cannot be evaluated
    ├── PeerError                   another process of the same run ended early
    ├── RecipeError                 a recipe is malformed or does not fit this model
    ├── ArtifactError               a GGUF, imatrix or observations file is broken
    ├── DependencyError             a library is missing or too old
    ├── OutputError                 the output cannot be written
    ├── PublishError                the Hub refuses an upload
    ├── JobError                    a rented machine cannot be had, or its job failed
    └── VerificationError           exit code 1: the output differs from the plan

Each message says where, what was found, what was expected and what to do.
"""


class Reap2ggufError(Exception):
    """The base of every error that the command line reports in one line."""

    exit_code = 2


class UsageError(Reap2ggufError):
    """Arguments contradict each other or the model, such as more experts kept than there are."""


class ParameterError(UsageError):
    """A parameter has a value that it cannot have; `names` are the parameters in the message.

    The command line says the options that set them instead.
    """

    def __init__(self, message: str, *names: str) -> None:
        super().__init__(message)
        self.names = names


class SourceError(Reap2ggufError):
    """The model named on the command line cannot be found or fetched."""


class CheckpointError(Reap2ggufError):
    """A checkpoint's files are broken, incomplete or disagree with each other."""


class UnknownTensorError(CheckpointError):
    """A stored tensor has a name that matches no rule of its architecture."""


class UnsupportedModelError(Reap2ggufError):
    """The architecture, or a value in its config, is not implemented."""


class CalibrationError(Reap2ggufError):
    """Calibration text or samples cannot be read, or do not fill one row of tokens."""


class BadSampleError(CalibrationError):
    """One sample cannot be used. Calibration skips and counts up to a tenth of its samples."""


class ObservationError(Reap2ggufError):
    """Too many rows of a calibration pass were not finite, so its sums cannot be trusted."""


class EvaluationError(Reap2ggufError):
    """Variants or tasks cannot be evaluated together, or computed values are not finite."""


class PeerError(Reap2ggufError):
    """Another process of the same run ended early."""


class RecipeError(Reap2ggufError):
    """A recipe is malformed, or one of its rules does not fit the model."""


class ArtifactError(Reap2ggufError):
    """A GGUF, imatrix or observations file is truncated, malformed or of another model."""


class DependencyError(Reap2ggufError):
    """A library that the task needs is missing, too old, or cannot be loaded."""


class OutputError(Reap2ggufError):
    """The output cannot be written, or would replace something that must be kept."""


class PublishError(Reap2ggufError):
    """The Hub cannot be reached, or refuses what is published."""


class JobError(Reap2ggufError):
    """The Hub refuses a job on a rented machine, or the job failed there."""


class VerificationError(Reap2ggufError):
    """The output differs from the plan; `violations` lists where."""

    exit_code = 1

    def __init__(self, violations: list[str], advice: str = "") -> None:
        self.violations = violations
        count = len(violations)
        found = f"verification found {count} violation{'s' if count != 1 else ''}"
        super().__init__(f"{found}; {advice}" if advice else found)
