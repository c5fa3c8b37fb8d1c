"""What is refused before anything is computed: missing libraries, and options that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from reap2gguf.errors import DependencyError, UsageError
from reap2gguf.evaluating.tasks.spec import TaskSpec
from reap2gguf.local.running import INSTALL
from reap2gguf.machine import processes

if TYPE_CHECKING:
    from reap2gguf.evaluating.generation.problems import SetName
    from reap2gguf.evaluating.options import EvaluateOptions
    from reap2gguf.evaluating.variants import Variant
    from reap2gguf.options import ComputeOptions


def check_options(options: EvaluateOptions, output: Path | None) -> None:
    """Raise DependencyError for a library that is missing, UsageError for what cannot be done."""
    names = {
        "--engine llama.cpp": options.engine == "llama.cpp",
        "--speed": options.speed,
        "--smoke-test": options.smoke_test,
        "--humaneval or --evalplus": bool(options.programs),
    }
    asked = [name for name, is_asked in names.items() if is_asked]
    if asked and processes().size > 1:
        raise UsageError(
            f"{asked[0]}: runs whole models in one process, and torchrun has started "
            f"{processes().size}; run this part without torchrun"
        )
    if options.needs_llama and find_spec("llama_cpp") is None:
        raise DependencyError(
            f"{asked[0]} needs llama-cpp-python, which is not installed; run `{INSTALL}`"
        )
    if options.tasks:
        from reap2gguf.evaluating.tasks.harness import check_installed

        check_installed()
        task_spec(options)
    if options.programs:
        _check_programs(options, output)


def task_spec(options: EvaluateOptions) -> TaskSpec:
    """The tasks. Raises UsageError for values that cannot be."""
    folder = None if options.task_folder is None else options.task_folder.expanduser()
    return TaskSpec(
        options.tasks, options.limit, options.num_fewshot, folder, options.allow_task_code
    )


def _check_programs(options: EvaluateOptions, output: Path | None) -> None:
    from reap2gguf.evaluating.generation.problems import load_problems
    from reap2gguf.evaluating.generation.sandbox.checking import Limits, require_guards
    from reap2gguf.evaluating.generation.vllm_model import check_vllm

    if output is None:
        raise UsageError(
            "the programs that models write need a place beside the output; pass --output"
        )
    if options.generate_with == "vllm":
        check_vllm()
    for name in options.programs:
        load_problems(cast("SetName", name), options.limit)
    if options.run_code:
        require_guards(Limits(), options.allow_unsandboxed)


def check_variants(
    options: EvaluateOptions, variants: Sequence[Variant], compute: ComputeOptions
) -> None:
    """Raise UsageError if there is nothing to measure, or a folder does not fit into memory."""
    for name, is_asked in (
        ("--engine llama.cpp", options.engine == "llama.cpp"),
        ("--speed", options.speed),
        ("--smoke-test", options.smoke_test),
    ):
        if is_asked and not any(one.kind == "gguf" for one in variants):
            raise UsageError(f"{name} is for GGUF files, and there is none; pass one")
    if options.programs and options.generate_with == "transformers":
        from reap2gguf.evaluating.generation.folder_model import check_fits

        for variant in variants:
            if variant.kind != "gguf" and variant.path is not None:
                check_fits(variant.path, variant.n_bytes, compute.likely_device)
