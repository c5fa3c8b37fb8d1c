"""Prune a Mixture-of-Experts checkpoint with REAP; publish it as verified GGUF and safetensors.

    import reap2gguf

    options = reap2gguf.BuildOptions(recipes=("unsloth-iq4km",), model="Qwen/Qwen3-30B-A3B")
    result = reap2gguf.build(options, progress=print)

What `__all__` names is the public API: it follows semantic versioning, and nothing else does. Names
are loaded when they are first used, so that `import reap2gguf` is quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap2gguf.api.budgeting import BudgetResult, weigh_budget
    from reap2gguf.api.builds import add, build, estimate, make_bundle, options_like, plan, verify
    from reap2gguf.api.choosing import Choice, choose
    from reap2gguf.api.comparing import compare
    from reap2gguf.api.evaluating import evaluate
    from reap2gguf.api.example import example
    from reap2gguf.api.fitting import FitResult, fit_recipe
    from reap2gguf.api.foreign_recipes import import_recipe, recipe_of
    from reap2gguf.api.imatrices import imatrix_statistics, merge_imatrices, slice_imatrix
    from reap2gguf.api.inspecting import inspect
    from reap2gguf.api.observations import merge_observations
    from reap2gguf.api.pruning import PruneResult, prune, select
    from reap2gguf.api.quantizing import QuantizeResult, quantize
    from reap2gguf.api.recipes import compare_recipes, recipe_table
    from reap2gguf.api.reporting import report
    from reap2gguf.api.selecting import Selection
    from reap2gguf.api.stages import imatrix, observe
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.building.needs.estimate import Estimate
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.slicing import SlicedImatrix
    from reap2gguf.building.stage import BuildResult
    from reap2gguf.bundle.evaluation import Evaluation
    from reap2gguf.comparing.compared import ModelComparison
    from reap2gguf.errors import Reap2ggufError, VerificationError
    from reap2gguf.evaluating.options import EvaluateOptions
    from reap2gguf.gguf_files.activation_statistics import ImatrixStatistics
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.gguf_files.imatrix_merge import MergedImatrix
    from reap2gguf.gguf_files.imatrix_statistics import ImatrixInspection
    from reap2gguf.gguf_source.inspection import GgufInspection
    from reap2gguf.importing.from_file import FoundRecipe
    from reap2gguf.importing.imported import ImportedRecipe
    from reap2gguf.options import BuildOptions, CalibrationOptions, CheckQuants, ComputeOptions
    from reap2gguf.progress import ProgressEvent
    from reap2gguf.pruning.inspection import BundleInspection, ObservationsInspection
    from reap2gguf.quantizing.named import RecipeText
    from reap2gguf.quantizing.role_table import RecipeDifference, RecipeTable
    from reap2gguf.verifying.report import VerifyReport

__version__ = "0.1.0"
__all__ = [
    "BudgetResult",
    "BuildOptions",
    "BuildResult",
    "BundleInspection",
    "CalibrationOptions",
    "CheckQuants",
    "Choice",
    "ComputeOptions",
    "Estimate",
    "EvaluateOptions",
    "Evaluation",
    "FitResult",
    "FoundRecipe",
    "GgufInspection",
    "Imatrix",
    "ImatrixInspection",
    "ImatrixStatistics",
    "ImportedRecipe",
    "MergedImatrix",
    "ModelComparison",
    "Observations",
    "ObservationsInspection",
    "Plan",
    "ProgressEvent",
    "PruneResult",
    "QuantizeResult",
    "Reap2ggufError",
    "RecipeDifference",
    "RecipeTable",
    "RecipeText",
    "Selection",
    "SlicedImatrix",
    "VerificationError",
    "VerifyReport",
    "add",
    "build",
    "choose",
    "compare",
    "compare_recipes",
    "estimate",
    "evaluate",
    "example",
    "fit_recipe",
    "imatrix",
    "imatrix_statistics",
    "import_recipe",
    "inspect",
    "make_bundle",
    "merge_imatrices",
    "merge_observations",
    "observe",
    "options_like",
    "plan",
    "prune",
    "quantize",
    "recipe_of",
    "recipe_table",
    "report",
    "select",
    "slice_imatrix",
    "verify",
    "weigh_budget",
]
_HOMES = {
    "api.budgeting": ("BudgetResult", "weigh_budget"),
    "api.builds": ("add", "build", "estimate", "make_bundle", "options_like", "plan", "verify"),
    "api.choosing": ("Choice", "choose"),
    "api.comparing": ("compare",),
    "api.evaluating": ("evaluate",),
    "api.example": ("example",),
    "api.imatrices": ("imatrix_statistics", "merge_imatrices", "slice_imatrix"),
    "api.fitting": ("FitResult", "fit_recipe"),
    "api.foreign_recipes": ("import_recipe", "recipe_of"),
    "api.inspecting": ("inspect",),
    "api.pruning": ("PruneResult", "prune", "select"),
    "api.quantizing": ("QuantizeResult", "quantize"),
    "api.recipes": ("compare_recipes", "recipe_table"),
    "api.observations": ("merge_observations",),
    "api.reporting": ("report",),
    "api.selecting": ("Selection",),
    "api.stages": ("imatrix", "observe"),
    "artifacts.observations": ("Observations",),
    "building.needs.estimate": ("Estimate",),
    "building.slicing": ("SlicedImatrix",),
    "building.stage": ("BuildResult",),
    "building.plan": ("Plan",),
    "bundle.evaluation": ("Evaluation",),
    "comparing.compared": ("ModelComparison",),
    "errors": ("Reap2ggufError", "VerificationError"),
    "evaluating.options": ("EvaluateOptions",),
    "gguf_files.activation_statistics": ("ImatrixStatistics",),
    "gguf_files.imatrix": ("Imatrix",),
    "gguf_files.imatrix_merge": ("MergedImatrix",),
    "gguf_files.imatrix_statistics": ("ImatrixInspection",),
    "gguf_source.inspection": ("GgufInspection",),
    "importing.from_file": ("FoundRecipe",),
    "importing.imported": ("ImportedRecipe",),
    "options": ("BuildOptions", "CalibrationOptions", "CheckQuants", "ComputeOptions"),
    "progress": ("ProgressEvent",),
    "pruning.inspection": ("BundleInspection", "ObservationsInspection"),
    "quantizing.named": ("RecipeText",),
    "quantizing.role_table": ("RecipeDifference", "RecipeTable"),
    "verifying.report": ("VerifyReport",),
}


def without_posix() -> str:
    """Why the program cannot run on this system; empty if it can."""
    if find_spec("fcntl") and find_spec("resource"):
        return ""
    return (
        "reap2gguf runs on Linux and macOS; on Windows use WSL2: run `wsl --install`, then install "
        "reap2gguf inside it"
    )


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            if problem := without_posix():
                raise ImportError(problem)
            value = getattr(import_module(f"reap2gguf.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'reap2gguf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
