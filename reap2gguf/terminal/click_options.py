"""Options that several commands share, and the values that they become."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, cast

import click
from click.core import ParameterSource

from reap2gguf.choosing.names import check_candidates
from reap2gguf.options import (
    EVALUATE_CHOICES,
    IMATRIX_FROM_CHOICES,
    BuildOptions,
    CalibrationOptions,
)
from reap2gguf.quantizing.named import DEFAULT_RECIPE
from reap2gguf.terminal.compute_options import (
    check_quants_option,
    collect_compute,
    compute_options,
    llama_cpp_option,
    threads_option,
)
from reap2gguf.terminal.config_file import config_option, like_option, settled
from reap2gguf.terminal.console import Detail, printing
from reap2gguf.terminal.help import (
    CALIBRATION,
    CHECKS,
    MODEL,
    MOST,
    WRITE,
    F,
    Number,
    option,
    together,
)
from reap2gguf.terminal.option_types import FilePath, FolderPath, LabelType
from reap2gguf.terminal.pruning_options import build_pruning_options
from reap2gguf.terminal.target_options import build_sensitivity_option, target_options

_DEFAULTS = CalibrationOptions()


def model_argument(
    name: str = "model", *, required: bool = True, type: Any = None
) -> Callable[[F], F]:
    """The argument that names the model, which --model names too: the option of many programs."""
    metavar = name.upper()

    def keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        ctx.meta[_MODEL] = value

    def choose(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        named = ctx.meta.get(_MODEL)
        is_typed = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if value is not None and named is not None and is_typed:
            raise click.UsageError(f"{metavar} was given twice: '{value}' and --model", ctx)
        if required and value is None and named is None:
            raise click.MissingParameter(ctx=ctx, param=param)
        return value if named is None else named

    return together(
        click.argument(
            name,
            required=False,
            type=type,
            metavar=metavar if required else f"[{metavar}]",
            callback=choose,
        ),
        option(
            "-m",
            "--model",
            "model_by_option",
            section=MODEL,
            type=type,
            metavar=metavar,
            callback=keep,
            is_eager=True,
            expose_value=False,
            help=f"Another way to pass {metavar}.",
        ),
    )


_MODEL = "reap2gguf.model"

seed_option = option(
    "--seed",
    section=CALIBRATION,
    type=Number(-MOST),
    default=_DEFAULTS.seed,
    metavar="S",
    help="Random seed: which samples and chunks are drawn, and their order.",
)

calibration_options = together(
    option(
        "--calibration",
        "spec",
        section=CALIBRATION,
        default=_DEFAULTS.spec,
        metavar="SPEC",
        help="Calibration text: a .txt, .jsonl or .parquet file, a folder of such files, the "
        "built-in mix `default`, a published mix (seed-000, seed-002, reap-agentic), a dataset on "
        "the Hub (owner/name), or several of these with a number of rows each: "
        "name[subset](split):n,name:n.",
    ),
    option(
        "--samples",
        section=CALIBRATION,
        type=Number(),
        metavar="N",
        help="Maximum number of calibration rows.",
        default_text="1024, or the sum of the :n counts in SPEC",
    ),
    option(
        "--max-length",
        section=CALIBRATION,
        type=Number(2),
        metavar="T",
        help="Maximum tokens per row.",
        default_text="2048, or the mix's own",
    ),
    seed_option,
    option(
        "--pack/--no-pack",
        section=CALIBRATION,
        default=None,
        help="Pack several samples into one full row (default for the published mixes), or use "
        "one row per sample (default otherwise).",
    ),
)

overwrite_option = option(
    "--overwrite", section=WRITE, is_flag=True, help="Replace the output if it exists."
)

json_option = option("--json", "as_json", is_flag=True, help="Print JSON.")


def _set_detail(detail: Detail) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_for_command(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if not value:
            return
        if ctx.meta.setdefault(_DETAIL, detail) is not detail:
            raise click.UsageError("--quiet and --verbose exclude each other", ctx)
        # until the whole program ends: errors are printed after the command's own context
        ctx.find_root().with_resource(printing(detail))

    return set_for_command


_DETAIL = "reap2gguf.detail"

output_options = together(
    option(
        "-v",
        "--verbose",
        is_flag=True,
        callback=_set_detail(Detail.VERBOSE),
        is_eager=True,
        expose_value=False,
        help="Print more: details, messages of libraries, causes of errors.",
    ),
    option(
        "-q",
        "--quiet",
        is_flag=True,
        callback=_set_detail(Detail.QUIET),
        is_eager=True,
        expose_value=False,
        help="Print only results and errors.",
    ),
)


def _with_sets(function: F) -> F:
    """Put what `--set` was given before the patterns of `--tensor-type`, as patterns."""

    @wraps(function)
    def with_sets(*args: Any, **arguments: Any) -> Any:
        if sets := arguments.pop("sets"):
            from reap2gguf.quantizing.role_settings import roles_as_patterns

            arguments["tensor_types"] = (*roles_as_patterns(sets), *arguments["tensor_types"])
        return function(*args, **arguments)

    return cast(F, with_sets)


tensor_type_option = together(
    option(
        "--tensor-type",
        "tensor_types",
        section=WRITE,
        multiple=True,
        metavar="PATTERN=TYPE",
        help="Give matching tensors another type, before the recipe's rules: a word such as "
        "attn_v=Q5_K, or a glob such as blk.0.*=Q8_0. Repeat it; the first match wins.",
    ),
    option(
        "--set",
        "sets",
        section=WRITE,
        multiple=True,
        metavar="ROLE[@LAYERS]=TYPE",
        help="The same by role, before --tensor-type: attention, experts, experts.down, "
        "shared_expert and so on, such as experts.down=Q6_K or attention@0-3=Q8_0.",
    ),
    _with_sets,
)

label_option = option(
    "--label",
    "labels",
    section=WRITE,
    type=LabelType(),
    multiple=True,
    metavar="RECIPE=LABEL",
    help="Give the file of a recipe another label, which ends its name.",
    default_text="the recipe's own",
)

follow_links_option = option(
    "--follow-links",
    section=MODEL,
    is_flag=True,
    help="Accept *.safetensors that are links, such as to another disk.",
)

build_options = together(
    model_argument(required=False),
    build_pruning_options,
    option(
        "-r",
        "--recipe",
        "recipes",
        section=WRITE,
        multiple=True,
        default=(DEFAULT_RECIPE,),
        metavar="NAME|FILE,...",
        help="Quantization recipes, with commas or repeated: file types such as Q5_K_M, names of "
        "`reap2gguf recipes list`, or TOML files.",
        default_text=f"{DEFAULT_RECIPE}; none with a target size; a GGUF file keeps its types",
    ),
    target_options,
    build_sensitivity_option,
    tensor_type_option,
    label_option,
    option(
        "-o",
        "--output",
        section=WRITE,
        type=FolderPath,
        default=Path("build"),
        metavar="DIR",
        help="Folder for the bundle.",
    ),
    option(
        "--name",
        section=WRITE,
        metavar="NAME",
        help="Name of the result.",
        default_text="<source>-REAP-<ratio>",
    ),
    calibration_options,
    option(
        "--observations",
        section=CALIBRATION,
        type=FilePath,
        metavar="FILE",
        help="Use observations that `observe` wrote, and skip that calibration pass.",
    ),
    option(
        "--imatrix",
        section=CALIBRATION,
        type=FilePath,
        metavar="FILE",
        help="Use an importance matrix, .gguf or .dat, of the result or of MODEL before pruning, "
        "and skip computing one.",
    ),
    option(
        "--imatrix-from",
        section=CALIBRATION,
        type=click.Choice(IMATRIX_FROM_CHOICES),
        default="pruned",
        help="Take the importance matrix on the pruned model, in a pass of its own, or on the "
        "source, in the pass that ranks the experts: one pass instead of two.",
    ),
    option(
        "--imatrix-text",
        section=CALIBRATION,
        type=FilePath,
        metavar="FILE",
        help="Text for the importance matrix.",
        default_text="the calibration text",
    ),
    option(
        "--chunk",
        section=CALIBRATION,
        type=Number(8),
        default=512,
        metavar="T",
        help="Tokens per chunk of the importance matrix.",
    ),
    option(
        "--imatrix-chunks",
        section=CALIBRATION,
        type=Number(),
        metavar="N",
        help="Maximum number of chunks for the importance matrix, spread over its text.",
        default_text="--samples x --max-length tokens of the calibration text, or all of FILE of "
        "--imatrix-text",
    ),
    option(
        "--evaluate",
        section=CHECKS,
        type=click.Choice(EVALUATE_CHOICES),
        default="auto",
        help="Measure perplexity and KL divergence: auto does so where it reads less than a fifth "
        "of the tokens that the other passes read.",
    ),
    compute_options,
    threads_option,
    check_quants_option,
    follow_links_option,
    config_option,
    like_option,
    llama_cpp_option,
)


def _candidates(arguments: dict[str, Any]) -> tuple[str, ...] | None:
    """The methods that were named; None for the usual ones."""
    named = arguments["candidates"]
    return None if named is None else check_candidates(named)


def collect(
    arguments: dict[str, Any],
    fresh: bool = False,
    replace: bool = False,
    check_space: bool = True,
) -> BuildOptions:
    """The arguments of `build` and `plan` as one value, with those of --config and --like."""
    arguments, revisions = settled(arguments)
    return BuildOptions(
        recipes=arguments["recipes"],
        target_size=arguments["target_size"],
        target_bpw=arguments["target_bpw"],
        fit=arguments["fit"],
        fit_context=arguments["fit_context"],
        sensitivity=arguments["sensitivity"],
        model=arguments["model"],
        labels=dict(arguments["labels"]),
        keep_experts=arguments["keep_experts"],
        compression=arguments["compression"],
        output=arguments["output"],
        name=arguments["name"],
        method=arguments["method"],
        candidates=_candidates(arguments),
        choose_text=arguments["choose_text"],
        protect=arguments["protect"],
        protect_super_experts=arguments["protect_super_experts"],
        mtp=arguments["mtp"],
        repair=arguments["repair"],
        group_size=arguments["group_size"],
        dequantize=arguments["dequantize"],
        evaluate=arguments["evaluate"],
        calibration=CalibrationOptions(
            arguments["spec"],
            arguments["samples"],
            arguments["max_length"],
            arguments["seed"],
            arguments["pack"],
            revisions,
        ),
        kept=arguments["kept"],
        observations=arguments["observations"],
        imatrix=arguments["imatrix"],
        imatrix_from=arguments["imatrix_from"],
        imatrix_text=arguments["imatrix_text"],
        chunk=arguments["chunk"],
        imatrix_chunks=arguments["imatrix_chunks"],
        compute=collect_compute(arguments),
        fresh=fresh,
        replace=replace,
        check_space=check_space,
        follow_links=arguments["follow_links"],
        tensor_types=arguments["tensor_types"],
    )
