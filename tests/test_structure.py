"""The shape of the package, measured from its source: imports, sizes, tests and dependencies.

An import counts wherever it stands, inside functions too; only imports for type checking do not.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.tiny import REPOSITORY

PACKAGE = REPOSITORY / "reap2gguf"
TESTS = REPOSITORY / "tests"

# Limits. Lower one when the package gets below it; do not raise one to make room.
MOST_CHAIN = 12  # modules
MOST_AT_THE_TOP = 14  # modules outside folders
MOST_LINES = 420  # of a file
MOST_UNFORMATTED = 3  # `# fmt: skip` in the package

# Modules without a test file of their own name: the file that tests them, why there, and which.
COVERED_BY = [
    ("terminal/test_help.py", "names of recipes that are none", ("quantizing/named.py",)),
    (
        "building/test_requantized.py",
        "which blocks of a GGUF source stay, and what plans and cards say of them",
        (
            "bundle/card_blocks.py",
            "gguf_files/blocks.py",
            "quantizing/source_blocks.py",
            "verifying/of_gguf.py",
        ),
    ),
    ("terminal/test_plan_views.py", "what JSON holds of a plan", ("terminal/plan_json.py",)),
    ("building/test_repair_folder.py", "a repair that was killed", ("building/work_beside.py",)),
    (
        "models/test_qwen_vision.py",
        "settings of images in one file or two",
        ("models/image_settings.py",),
    ),
    (
        "tokenizer/test_sentencepiece.py",
        "vocabularies of characters that are broken",
        ("tokenizer/character_bpe.py",),
    ),
    (
        "observing/compute/test_experts.py",
        "whole experts, with a gate and without one",
        ("observing/compute/gating.py",),
    ),
    ("quantizing/ik/test_workers.py", "the program that they run", ("quantizing/ik/worker.py",)),
    (
        "building/test_fit_stage.py",
        "a build of a file for a size, from its plan to its bytes",
        ("building/sized.py", "terminal/target_views.py"),
    ),
    (
        "models/test_nemotron_h.py",
        "headers of the whole family",
        ("models/nemotron_from_gguf.py",),
    ),
    ("pruning/test_select.py", "numbers of experts that no model has", ("pruning/counts.py",)),
    (
        "fitting/test_trading.py",
        "experts against bits, from Python and on the command line",
        ("api/budgeting.py", "terminal/budget_command.py"),
    ),
    ("gguf_files/test_split.py", "names of parts", ("gguf_files/part_names.py",)),
    ("fitting/test_probing.py", "the rows of probes", ("fitting/probe_text.py",)),
    (
        "building/test_weigh_stage.py",
        "builds that weigh experts against bits, from their plans to their cards",
        (
            "building/observed.py",
            "building/weighed.py",
            "bundle/card_budget.py",
            "fitting/counts.py",
            "fitting/lines.py",
            "verifying/budget.py",
        ),
    ),
    (
        "building/test_bundling.py",
        "what is made of them",
        ("building/bundle_options.py",),
    ),
    (
        "choosing/test_candidates.py",
        "which observations rank candidates",
        ("choosing/checks.py",),
    ),
    (
        "merging/test_sweep.py",
        "whole merges",
        (
            *("merging/budget.py", "merging/capture.py", "merging/layer.py"),
            *("merging/room.py", "observing/narrowed.py"),
        ),
    ),
    ("merging/test_alignment.py", "sums over tokens too", ("merging/statistics.py",)),
    ("merging/test_grouping.py", "groups are what a layer keeps", ("merging/merge.py",)),
    (
        "building/test_merge_stage.py",
        "what a build records and says, and its files",
        ("building/merge_record.py", "bundle/card_merge.py", "merging/folder.py"),
    ),
    (
        "building/test_merge_folder.py",
        "what `prune` makes of a model",
        ("api/changes.py",),
    ),
    (
        "choosing/test_repaired_candidate.py",
        "the candidate that is repaired",
        ("choosing/repaired.py",),
    ),
    (
        "building/test_repair_stage.py",
        "what a bundle records",
        ("building/repair_record.py",),
    ),
    (
        "pruning/test_layer_files.py",
        "files of layers hold them",
        ("repairing/fit.py", "repairing/record.py", "pruning/layer_facts.py"),
    ),
    ("choosing/test_holdout.py", "how many rows are held out", ("choosing/amounts.py",)),
    ("bundle/test_choice.py", "records hold estimates", ("bundle/estimate.py",)),
    (
        "building/test_choose_stage.py",
        "cards and manifest of a bundle whose method was chosen",
        ("bundle/card_candidates.py", "verifying/choice.py"),
    ),
    (
        "terminal/test_choose_command.py",
        "as it is typed and as it is called",
        ("api/choosing.py", "terminal/pruning_options.py"),
    ),
    (
        "building/test_evaluate_stage.py",
        "how much text a build scores",
        ("building/needs/scoring.py",),
    ),
    (
        "quantizing/test_overrides.py",
        "roles become patterns, and patterns rules",
        ("quantizing/role_settings.py",),
    ),
    (
        "terminal/test_evaluate_command.py",
        "bundles and files as they are named",
        (
            "api/evaluating.py",
            "evaluating/measure.py",
            "evaluating/opening.py",
            "terminal/evaluate_views.py",
        ),
    ),
    (
        "terminal/test_evaluate_parts.py",
        "all that one command measures, refuses and keeps",
        (
            "evaluating/checks.py",
            "evaluating/llama/outside.py",
            "evaluating/scoring.py",
            "evaluating/whole.py",
        ),
    ),
    (
        "reporting/test_page.py",
        "the sections of one page, whose numbers are compared with what they are of",
        (
            "reporting/answers.py", "reporting/damage.py", "reporting/experts.py",
            "reporting/file_list.py", "reporting/making.py", "reporting/overview.py",
            "reporting/precision.py", "reporting/running.py",
        ),
    ),
    (
        "terminal/test_report_command.py",
        "a report is what the command writes",
        ("api/reporting.py",),
    ),
    (
        "building/test_pipeline.py",
        "every build reads its texts",
        ("building/plan_sides.py", "building/text_stage.py"),
    ),
    (
        "repairing/test_gram.py",
        "the Gram matrix is made of features",
        ("repairing/features.py",),
    ),
    (
        "repairing/test_sweep.py",
        "what is captured and how it is stored, for every family",
        ("repairing/capture.py", "repairing/stored.py"),
    ),
    (
        "building/test_repair_folder.py",
        "folders that are pruned and repaired",
        ("api/repairs.py",),
    ),
    (
        "building/test_repair_stage.py",
        "whole bundles with a repair: their cards, and what is wrong with changed ones",
        ("bundle/card_repair.py", "verifying/changed.py"),
    ),
    (
        "observing/test_loader.py",
        "loaders read with them",
        ("observing/readers.py",),
    ),
    (
        "building/test_prune_gguf.py",
        "the parts of a pruned file, compared with what pruned safetensors give",
        (
            "gguf_source/checking.py", "gguf_source/header.py", "gguf_source/inspection.py",
            "gguf_source/slices.py",
            "gguf_source/writing.py", "verifying/sliced.py",
        ),
    ),
    (
        "building/test_slice_stage.py",
        "bundles of GGUF files, from their plan to their verification",
        ("building/as_stored.py", "building/sliced_record.py", "verifying/opening.py"),
    ),
    (
        "gguf_source/test_checkpoint.py",
        "a file as a source: its names, its folder, its tokens, and observations of it",
        (
            "building/given_alike.py", "gguf_source/file.py", "gguf_source/folder.py",
            "tokenizer/identity.py",
        ),
    ),
    (
        "evaluating/test_engine.py",
        "variants of every kind are evaluated",
        ("evaluating/head_weights.py", "evaluating/run.py", "evaluating/variants.py"),
    ),
    (
        "evaluating/llama/test_scoring.py",
        "files are loaded and read through these",
        ("evaluating/llama/decoding.py", "evaluating/llama/model.py"),
    ),
    (
        "evaluating/llama/test_smoke.py",
        "both answers of a smoke test",
        ("evaluating/llama/transformers_answer.py",),
    ),
    (
        "evaluating/generation/test_run.py",
        "whole runs with every engine",
        (
            "evaluating/generation/folder_model.py", "evaluating/generation/generators.py",
            "evaluating/generation/llama_model.py", "evaluating/generation/vllm_model.py",
        ),
    ),
    (
        "evaluating/generation/test_extraction.py",
        "programs are what is taken out of answers",
        ("evaluating/generation/programs.py",),
    ),
    (
        "evaluating/generation/sandbox/test_checking.py",
        "both processes and their jail, attacked",
        (
            "evaluating/generation/sandbox/candidate.py", "evaluating/generation/sandbox/jail.py",
            "evaluating/generation/sandbox/judge.py", "evaluating/generation/sandbox/landlock.py",
            "evaluating/generation/sandbox/system_calls.py",
        ),
    ),
    (
        "quantizing/kernels/test_cuda.py",
        "each kernel is compiled and run",
        ("quantizing/kernels/gpu_kernels.py",),
    ),
    (
        "observing/compute/test_nodes.py",
        "processes on machines of their own",
        ("api/peers.py",),
    ),
    (
        "test_main.py",
        "the program as a process",
        ("__main__.py",),
    ),
    (
        "test_cli.py",
        "commands are tested as they are typed",
        ("terminal/stage_commands.py",),
    ),
    (
        "building/test_slicing.py",
        "models are read to cut a matrix to them",
        ("building/pruned_models.py",),
    ),
    (
        "terminal/test_imatrix_commands.py",
        "files are shown, cut and added as it is typed",
        ("api/imatrices.py", "terminal/imatrix_views.py"),
    ),
    (
        "test_resources.py",
        "the example as it is written",
        ("api/example.py", "terminal/example_command.py"),
    ),
    (
        "test_docs.py",
        "every error is drawn, every option is documented",
        (
            "errors.py", "terminal/click_options.py", "terminal/compute_options.py",
            "terminal/pruning_options.py",
        ),
    ),
    (
        "test_doctor.py",
        "the parts of one report",
        (
            "doctor/finding.py", "doctor/machine.py", "doctor/software.py",
            "terminal/doctor_command.py",
        ),
    ),
    (
        "quantizing/kernels/test_cuda.py",
        "the driver does what a GPU's quantizers ask for",
        ("quantizing/kernels/driver.py",),
    ),
    (
        "building/test_bundling.py",
        "the command is typed there",
        ("building/pruned_choice.py", "terminal/bundle_command.py"),
    ),
    (
        "building/test_given.py",
        "a given importance matrix is a whole build's",
        ("building/given_stage.py",),
    ),
    (
        "building/test_pipeline.py",
        "the parts of a build, which is compared byte by byte",
        (
            "building/asked.py", "building/plan.py", "building/prune_folder.py",
            "building/record.py", "building/stages.py", "options.py", "terminal/views.py",
        ),
    ),
    (
        "building/test_verify_stage.py",
        "which files the stage quantizes again",
        ("building/exact.py",),
    ),
    (
        "building/needs/test_estimate.py",
        "the parts of an estimate, which is compared with builds and with a sweep's decision",
        (
            "building/needs/amount.py", "building/needs/disk.py", "building/needs/memory.py",
            "building/needs/room.py", "building/needs/seconds.py", "building/needs/sizes.py",
            "building/needs/file_seconds.py",
        ),
    ),
    (
        "building/test_adding.py",
        "the parts of an addition, which is compared with a whole build",
        (
            "building/add.py", "building/adopting.py", "building/bundle_files.py",
            "building/extending.py", "building/finished.py", "building/standing.py",
            "terminal/add_command.py",
        ),
    ),
    (
        "bundle/test_manifest.py",
        "the parts of a manifest",
        ("bundle/bounds.py", "bundle/records.py", "bundle/options_record.py"),
    ),
    (
        "bundle/test_card.py",
        "the parts of a card",
        (
            "bundle/card_calibration.py", "bundle/card_files.py", "bundle/card_making.py",
            "bundle/front_matter.py",
        ),
    ),
    (
        "bundle/test_card_quality.py",
        "the results in a card's front matter",
        ("bundle/model_index.py",),
    ),
    (
        "evaluating/test_head.py",
        "the cut of the heads",
        ("evaluating/head_cut.py",),
    ),
    (
        "bundle/pictures/test_experts.py",
        "what all pictures share",
        ("bundle/pictures/canvas.py",),
    ),
    (
        "publishing/test_prepare.py",
        "a bundle is opened in order to be pushed",
        ("bundle/layout.py", "bundle/opening.py", "publishing/contents.py"),
    ),
    (
        "publishing/test_push.py",
        "what a push does is seen on the loopback Hub",
        (
            "publishing/admission.py", "publishing/readback.py", "publishing/remote.py",
            "terminal/publish_commands.py",
        ),
    ),
    (
        "jobs/test_hub_jobs.py",
        "a job is what is posted to the loopback Hub",
        (
            "jobs/flavors.py", "jobs/order.py", "jobs/request.py", "terminal/build_words.py",
            "terminal/jobs_command.py",
        ),
    ),
    (
        "jobs/test_deploy.py",
        "machines are ordered by the files in deploy/",
        ("jobs/needs.py", "jobs/sky.py"),
    ),
    (
        "calibration/test_layouts.py",
        "calls are part of layouts",
        ("calibration/tool_calls.py",),
    ),
    (
        "calibration/test_samples.py",
        "messages are seen by what the template prints of them",
        ("calibration/conversations.py",),
    ),
    (
        "calibration/test_rows.py",
        "rows as they are stored",
        ("artifacts/texts.py",),
    ),
    (
        "checkpoint/test_checkpoint.py",
        "the parts of a checkpoint's folder",
        (
            "checkpoint/entries.py", "checkpoint/index.py", "checkpoint/tensor_files.py",
            "checkpoint/weights.py",
        ),
    ),
    (
        "exporting/test_gguf_export.py",
        "the parts of a GGUF file that llama.cpp compares",
        ("exporting/header.py", "exporting/row_ranges.py", "gguf_files/writer.py"),
    ),
    (
        "exporting/test_qwen3_5_llama_cpp.py",
        "a model and its projector",
        ("exporting/model_files.py",),
    ),
    (
        "exporting/test_general.py",
        "whole headers, as verification makes them again",
        ("exporting/header_facts.py",),
    ),
    (
        "tokenizer/test_gguf_keys.py",
        "what is written is what was checked",
        ("tokenizer/check.py",),
    ),
    (
        "test_api.py",
        "the functions as they are called",
        (
            "api/builds.py", "api/opening.py", "api/pruning.py", "api/quantizing.py",
            "api/selecting.py", "api/stages.py", "api/texts.py",
            "hub/opened.py",
        ),
    ),
    (
        "terminal/test_observations_commands.py",
        "files are merged and shown as it is typed",
        ("api/observations.py", "terminal/observations_views.py"),
    ),
    (
        "terminal/test_inspect_command.py",
        "an inspection is what is printed of it",
        ("api/inspecting.py", "terminal/inspect_views.py"),
    ),
    (
        "hub/test_shards.py",
        "errors of a download",
        ("hub/errors.py",),
    ),
    (
        "local/test_chat.py",
        "both engines are run by `chat`",
        (
            "local/engine.py", "local/engine_process.py", "local/frames.py",
            "local/llama_process.py", "local/programs.py", "local/running.py",
            "terminal/local_commands.py",
        ),
    ),
    (
        "fitting/test_fitted.py",
        "recipes that are made for a model, and the files that they make",
        ("api/fitting.py",),
    ),
    (
        "importing/test_foreign.py",
        "types by the names that other programs have for them",
        ("importing/foreign_types.py",),
    ),
    (
        "terminal/test_recipe_makers.py",
        "the functions as the commands call them",
        ("api/foreign_recipes.py",),
    ),
    (
        "quantizing/test_recipe.py",
        "types as recipes name them",
        ("quantizing/type_names.py",),
    ),
    (
        "quantizing/test_role_table.py",
        "tables and sizes as they are asked for",
        ("api/recipes.py", "exporting/file_size.py"),
    ),
    (
        "models/test_contract.py",
        "what every architecture answers",
        ("models/description.py", "observing/targets.py"),
    ),
    (
        "models/test_config_fields.py",
        "every field of transformers' configs",
        ("models/facts.py",),
    ),
    (
        "models/test_shared.py",
        "rules that architectures share",
        ("models/rules.py",),
    ),
    (
        "observing/test_sweep.py",
        "the parts of a sweep, whose sums are compared with transformers",
        ("observing/linear_attention.py", "observing/passes.py", "observing/probe.py"),
    ),
    (
        "observing/compute/test_kernels.py",
        "ways to compute the same numbers",
        (
            "observing/compute/triton_convolution.py",
            "observing/compute/triton_experts.py",
            "observing/compute/triton_kernels.py",
            "observing/compute/triton_saliency.py",
        ),
    ),
    (
        "comparing/test_compared.py",
        "whole comparisons, and what is shown of them",
        (
            "api/comparing.py", "comparing/contents.py", "comparing/opening.py",
            "comparing/picture.py", "comparing/quality.py", "terminal/compare_command.py",
            "terminal/compare_views.py",
        ),
    ),
    (
        "hub/test_gguf_file.py",
        "ranges of a file are what is read of it",
        ("hub/ranges.py",),
    ),
    (
        "models/test_contract.py",
        "headers of every family, compared as a whole with llama.cpp's",
        (
            "models/header_entries.py", "models/hybrid.py",
            "models/scored_router.py",
        ),
    ),
    (
        "tokenizer/test_form.py",
        "parts of a tokenizer.json",
        ("tokenizer/advice.py", "tokenizer/post_processor.py", "tokenizer/settings.py"),
    ),
    (
        "tokenizer/test_tokenizer.py",
        "what transformers loads, beside the ids of calibration",
        ("tokenizer/in_transformers.py",),
    ),
    (
        "tokenizer/test_vocabulary.py",
        "what a header stores of a tokenizer.json",
        ("tokenizer/added_tokens.py", "tokenizer/merges.py"),
    ),
    (
        "tokenizer/test_published.py",
        "the patterns and special tokens of each family, as its tokenizers have them",
        ("models/tokenizer_families.py",),
    ),
    (
        "models/test_from_gguf.py",
        "what is read from a header is compared as a whole model",
        ("models/gguf_keys.py", "models/linear_from_gguf.py"),
    ),
    (
        "exporting/test_against_llama_cpp.py",
        "tables and rules of llama.cpp, compared with it type by type",
        ("quantizing/mixture.py",),
    ),
    (
        "tokenizer/test_gguf_keys.py",
        "the files that the keys are read from",
        ("tokenizer/tokenizer_files.py",),
    ),
    (
        "tokenizer/test_llama_bpe.py",
        "words are split and then merged, which llama.cpp does in one",
        (
            "tokenizer/pre_tokenizers.py",
            "tokenizer/special_names.py",
            "tokenizer/special_split.py",
        ),
    ),
    (
        "terminal/test_recipe_commands.py",
        "the lines that the commands print",
        ("terminal/recipe_views.py",),
    ),
    (
        "terminal/test_mixes_command.py",
        "the lines that the commands print",
        ("terminal/mix_views.py",),
    ),
    (
        "terminal/test_build_commands.py",
        "what --json prints",
        ("terminal/json_views.py",),
    ),
    (
        "tokenizer/test_templates.py",
        "the files that templates lie in",
        ("tokenizer/tokenizer_files.py",),
    ),
    (
        "verifying/test_generated.py",
        "what is made again is compared line by line",
        ("verifying/differences.py",),
    ),
    (
        "verifying/test_damage.py",
        "each kind of damage is found in a whole bundle",
        ("verifying/bundle.py", "verifying/gguf_file.py"),
    ),
    (
        "verifying/test_gguf_values.py",
        "bounds are what they let pass and what they find",
        ("verifying/exactness.py", "verifying/matrices.py"),
    ),
    (
        "verifying/test_facts.py",
        "each fact is changed in a whole bundle",
        ("verifying/gguf_part.py", "verifying/imatrix_files.py"),
    ),
    (
        "verifying/test_against_source.py",
        "the report of a comparison with the source is the fullest",
        (
            "terminal/report_views.py", "verifying/context.py", "verifying/exactness.py",
            "verifying/report.py",
        ),
    ),
]  # fmt: skip

# Distributions that are imported but not declared, and the reverse; each with the reason.
NOT_DECLARED = {
    "hatchling": "builds the wheel, see [build-system]",
    "triton": "a dependency of torch's CUDA builds; used only on a GPU",
    "vllm": "used where it is installed, with a torch of its own",
}
# extras that the package itself does not need
FOR_TESTS = ("test", "fuzz")
FOR_DOCS = ("docs",)
NOT_IMPORTED = {
    "ik-llama-cpp-python": "its library is loaded by ctypes, in processes of its own",
    "libggml-python": "its library is loaded by ctypes, after a search without an import",
    "flash-linear-attention": "transformers imports it where it is installed",
}
# of distributions that need not be installed: their modules have other names
OF_MODULES = {"ik_llama_cpp": "ik-llama-cpp-python"}
COMMANDS = {
    "ruff",
    "mypy",
    "pytest-xdist",
    "hatchling",
}  # of the extra `test`: not imported by tests


@cache
def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports at run time, at any depth."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


@cache
def graph() -> dict[str, list[str]]:
    """The package's modules that each module imports."""
    known = sources()
    found = {}
    for name, path in known.items():
        modules = set()
        for full in imported(path):
            # `from package.module import name`: the name may itself be a module
            module = full if full in known else full.rpartition(".")[0]
            if module in known and module != name:
                modules.add(module)
        found[name] = sorted(modules)
    return found


def longest_chain() -> list[str]:
    """The most modules of which each imports the next."""
    assert not cycle(), "see test_no_import_cycles"
    chains: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in chains:
            below = max((chain(module) for module in graph()[name]), key=len, default=[])
            chains[name] = [name, *below]
        return chains[name]

    return max(map(chain, graph()), key=len)


def cycle() -> list[str]:
    """Modules of which each imports the next and the last imports the first; none if there are no
    such modules."""
    finished: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name not in finished:
            for module in graph()[name]:
                if found := search(module, [*path, name]):
                    return found
            finished.add(name)
        return []

    return next(filter(None, (search(name, []) for name in graph())), [])


def test_no_import_cycles() -> None:
    found = cycle()
    assert not found, (
        "modules import each other; move what they share to a lower module: "
        + " -> ".join([*found, *found[:1]])
    )


def layers() -> tuple[list[list[str]], set[str]]:
    """The rows of docs/architecture.md, and the modules that every row may import."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Layers\n")[1].split("\n## ")[0]
    rows = section.split("```text\n")[1].split("\n```")[0].splitlines()
    anywhere = re.findall(r"`(\w+)/(\w+)\.py`", section)
    return [row.split(", ") for row in rows], {f"reap2gguf.{a}.{b}" for a, b in anywhere}


def test_imports_go_downward() -> None:
    rows, anywhere = layers()
    row_of = {part: number for number, row in enumerate(rows) for part in row}
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    named = sorted(part for row in rows for part in row)
    assert named == sorted(parts - {"__init__", "__main__", "__pycache__"})
    upward = set()
    for name, modules in graph().items():
        for module in modules:
            of, to = (one.split(".")[1] if "." in one else "" for one in (name, module))
            if of in row_of and to in row_of and row_of[to] < row_of[of]:
                upward.add((name, module))
    wrong = sorted(f"{name} -> {module}" for name, module in upward if module not in anywhere)
    assert not wrong, f"move what both need to a lower row (docs/architecture.md): {wrong}"
    idle = sorted(anywhere - {module for _, module in upward})
    assert not idle, f"no lower row imports these any more; remove them from the list: {idle}"


def test_the_longest_chain_of_imports() -> None:
    chain = longest_chain()
    assert len(chain) <= MOST_CHAIN, (
        f"{len(chain)} modules in a chain of imports, at most {MOST_CHAIN} expected; import the "
        f"lower module directly, or pass in what it makes: {' -> '.join(chain)}"
    )


def test_folders_that_list_their_modules_list_all() -> None:
    wrong = {}
    for path in (path for path in sources().values() if path.name == "__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        modules = {module.stem for module in path.parent.glob("*.py")} - {"__init__"}
        listed = set(re.findall(r"^ *(\w+)(?:\.py)? {2,}\S", text, re.MULTILINE))
        differ = (modules - set(re.findall(r"\w+", text))) | (listed - modules)
        if len(listed & modules) > 2 and differ:
            wrong[str(path.relative_to(REPOSITORY))] = sorted(differ)
    assert not wrong, f"list these in the docstring, or no more: {wrong}"


def test_few_modules_at_the_top() -> None:
    found = sorted(path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
    assert len(found) <= MOST_AT_THE_TOP, f"move a module into the folder of its job: {found}"


def test_no_file_is_long() -> None:
    lines = {
        str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8").count("\n")
        for path in sources().values()
    }
    found = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert not found, f"more than {MOST_LINES} lines; divide each by what its parts do: {found}"


def test_the_formatter_formats_the_code() -> None:
    found = {
        str(path.relative_to(REPOSITORY)): count
        for path in sources().values()
        if (count := len(re.findall(r"# fmt: (?:skip|off)", path.read_text(encoding="utf-8"))))
    }
    total = sum(found.values())
    assert total <= MOST_UNFORMATTED, (
        f"let ruff format these lines, as they are or grouped: {found}"
    )


def modules_to_test() -> set[str]:
    """Every module with code, as a path below the package."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in sources().values()
        if path.name != "__init__.py"
    }


def own_test(module: str) -> Path:
    """Where the tests of a module are if they are at its mirrored path."""
    path = Path(module)
    return TESTS / path.parent / f"test_{path.name}"


def test_every_module_has_its_test_file() -> None:
    elsewhere = {module for _, _, modules in COVERED_BY for module in modules}
    missing = sorted(
        module for module in modules_to_test() - elsewhere if not own_test(module).is_file()
    )
    assert not missing, (
        "write tests/FOLDER/test_MODULE.py for each of these, or name the file that runs it in "
        f"COVERED_BY (tests/test_structure.py): {missing}"
    )


def test_every_exception_is_still_one() -> None:
    for test, _, modules in COVERED_BY:
        assert (TESTS / test).is_file(), f"COVERED_BY names tests/{test}, which is not there"
        for module in modules:
            assert module in modules_to_test(), f"COVERED_BY names {module}, which is not there"
            assert not own_test(module).is_file(), f"{module} has tests: remove it from COVERED_BY"


def canonical(requirement: str) -> str:
    """The name of a distribution in a requirement, as an index compares it."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*, for_tests: bool = False) -> set[str]:
    """Distributions that pyproject.toml declares for the package, extras included, or for tests."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [] if for_tests else list(project["dependencies"])
    for extra in extras:
        if extra not in FOR_DOCS and (extra in FOR_TESTS) is for_tests:
            names += extras[extra]
    return {canonical(name) for name in names} - {"reap2gguf"}


def used(paths: list[Path]) -> dict[str, str]:
    """Distributions that files import, each with one of the files."""
    names = packages_distributions()
    own = {*sys.stdlib_module_names, "reap2gguf", "tests"}
    found = {}
    for path in paths:
        for module in {full.partition(".")[0] for full in imported(path)} - own:
            # the module's name if it is not installed
            distributions = names.get(module, [OF_MODULES.get(module, module)])
            found[canonical(distributions[0])] = str(path.relative_to(REPOSITORY))
    return found


def test_what_the_package_imports_is_declared() -> None:
    found = used(list(sources().values()))
    missing = found.keys() - declared() - NOT_DECLARED.keys()
    assert not missing, f"add to dependencies in pyproject.toml: {[(n, found[n]) for n in missing]}"
    assert NOT_DECLARED.keys() <= found.keys(), "remove from NOT_DECLARED what is not imported"


def test_what_is_declared_is_imported() -> None:
    unused = declared() - used(list(sources().values())).keys()
    assert unused == NOT_IMPORTED.keys(), "remove from pyproject.toml what is not imported"


def test_what_the_tests_import_is_declared() -> None:
    found = used(sorted(TESTS.rglob("*.py")))
    extras = declared(for_tests=True)
    missing = found.keys() - declared() - extras
    assert not missing, f"add to the extra `test`: {[(n, found[n]) for n in missing]}"
    unused = extras - found.keys() - COMMANDS
    assert not unused, f"remove from the extra `test`, no test imports these: {unused}"
