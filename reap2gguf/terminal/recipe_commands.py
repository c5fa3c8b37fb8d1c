"""`reap2gguf recipes`: list, show, compare, check and fit; `budget_command.py` has budget."""

from __future__ import annotations

from pathlib import Path

import click

from reap2gguf.messages import size
from reap2gguf.terminal.budget_command import recipes_budget
from reap2gguf.terminal.click_options import (
    follow_links_option,
    json_option,
    model_argument,
    output_options,
    overwrite_option,
    tensor_type_option,
)
from reap2gguf.terminal.compute_options import (
    llama_cpp_option,
    quantizing_device_option,
    threads_option,
)
from reap2gguf.terminal.console import (
    say,
    say_all,
    say_json,
    screen_progress,
    terminal_progress,
)
from reap2gguf.terminal.help import WRITE, command, option
from reap2gguf.terminal.option_types import FilePath
from reap2gguf.terminal.recipe_makers import recipes_import, recipes_of
from reap2gguf.terminal.suggestions import Group
from reap2gguf.terminal.target_options import sensitivity_option, target_options


@click.group(cls=Group)
def recipes() -> None:
    """List, show, compare and make recipes.

    A recipe says which quant type each tensor gets. Every file type of llama.cpp, such as Q5_K_M,
    is one.

    \b
    Example:
      reap2gguf recipes list
      reap2gguf recipes check my-recipe.toml ./Qwen3-30B-A3B
    """


@command("list")
@json_option
@output_options
def recipes_list(as_json: bool) -> None:
    """List recipes and their bits per weight.

    Included recipes first, then the file types of llama.cpp. Bits are those of one well-known
    model; `recipes check` prints those of yours.

    \b
    Example:
      reap2gguf recipes list
    """
    from reap2gguf.terminal.recipe_views import list_as_json, list_lines

    if as_json:
        say_json(list_as_json())
    else:
        say_all(list_lines())


unweighted_option = option(
    "--no-imatrix",
    "unweighted",
    section=WRITE,
    is_flag=True,
    help="Show the types of a file that is made without an importance matrix.",
)


@command("show")
@click.argument("name")
@click.argument("model", required=False)
@tensor_type_option
@unweighted_option
@option("--toml", "as_toml", is_flag=True, help="Print TOML, to start a recipe of your own.")
@json_option
@output_options
def recipes_show(
    name: str,
    model: str | None,
    tensor_types: tuple[str, ...],
    unweighted: bool,
    as_toml: bool,
    as_json: bool,
) -> None:
    """Show a recipe, or what it gives a model.

    NAME is an included recipe, a file type such as Q5_K_M, or a TOML file. Without MODEL, prints
    its rules. With MODEL (a folder, a GGUF file, or a name on the Hub) prints the types by role and
    layers, with elements, bits per weight and sizes, and the size of the whole file; a star marks
    tensors whose rows do not fill the blocks of the type that was meant. Reads headers only.

    \b
    Example:
      reap2gguf recipes show unsloth-iq4km
      reap2gguf recipes show unsloth-iq4km --toml > my-recipe.toml
      reap2gguf recipes show unsloth-iq4km ./Qwen3-30B-A3B
      reap2gguf recipes show Q4_K_M Qwen/Qwen3-30B-A3B --set experts.down=q6_k
    """
    if as_toml and as_json:
        raise click.UsageError("--toml and --json exclude each other")
    if model is not None and as_toml:
        raise click.UsageError("--toml prints the recipe alone; leave MODEL out")
    if model is None and unweighted:
        raise click.UsageError("--no-imatrix is about the types of a model; pass MODEL")
    if model is None:
        _say_rules(name, tensor_types, as_toml, as_json)
    else:
        _say_types(name, model, tensor_types, unweighted, as_json)


def _say_types(
    name: str, model: str, tensor_types: tuple[str, ...], unweighted: bool, as_json: bool
) -> None:
    """Print what a recipe gives a model."""
    import reap2gguf
    from reap2gguf.terminal import recipe_views

    table = reap2gguf.recipe_table(
        name,
        model,
        tensor_types=tensor_types,
        weighted=not unweighted,
        progress=terminal_progress(),
    )
    if as_json:
        say_json(recipe_views.table_as_json(table))
    else:
        say_all(recipe_views.table_lines(table))


def _say_rules(name: str, tensor_types: tuple[str, ...], as_toml: bool, as_json: bool) -> None:
    """Print the rules of a recipe."""
    from reap2gguf.quantizing.overrides import read_overrides
    from reap2gguf.quantizing.recipe import load_recipe
    from reap2gguf.terminal import recipe_views

    recipe = load_recipe(name).with_overrides(read_overrides(tensor_types))
    if as_toml:
        # each line is made safe: a comment of a file may hold what moves the cursor
        say_all(recipe.source.splitlines())
    elif as_json:
        say_json(recipe_views.recipe_as_json(recipe))
    else:
        say_all(recipe_views.recipe_lines(recipe))


@command("diff")
@click.argument("first")
@click.argument("second")
@click.argument("model", required=False)
@unweighted_option
@json_option
@output_options
def recipes_diff(
    first: str, second: str, model: str | None, unweighted: bool, as_json: bool
) -> None:
    """Show where two recipes differ for a model.

    FIRST and SECOND are recipes as for `recipes show`; MODEL is the bundled example by default.
    Prints the tensors that get another type, by role and layers, with bits per weight and the
    change of size, then both files. Reads headers only.

    \b
    Example:
      reap2gguf recipes diff Q4_K_M unsloth-q4kxl ./Qwen3-30B-A3B
      reap2gguf recipes diff Q4_K_M my-recipe.toml Qwen3-30B-A3B-Q8_0.gguf
    """
    import reap2gguf
    from reap2gguf.terminal import recipe_views

    found = reap2gguf.compare_recipes(
        first, second, model, weighted=not unweighted, progress=terminal_progress()
    )
    if as_json:
        say_json(recipe_views.difference_as_json(found))
    else:
        say_all(recipe_views.difference_lines(found))


@command("check")
@click.argument("name")
@click.argument("model", required=False)
@tensor_type_option
@json_option
@output_options
def recipes_check(
    name: str, model: str | None, tensor_types: tuple[str, ...], as_json: bool
) -> None:
    """Show which types a recipe gives a model.

    NAME is an included recipe, a file type such as Q5_K_M, or a TOML file; MODEL is the bundled
    example by default. Prints types, sizes and bits per weight, one line per name and type of
    tensors, or what is wrong. Reads headers only.

    \b
    Example:
      reap2gguf recipes check my-recipe.toml ./Qwen3-30B-A3B
      reap2gguf recipes check Q4_K_M ./Qwen3-30B-A3B --tensor-type attn_v=Q8_0
      reap2gguf recipes check Q4_K_M --set experts.down=q6_k --set attention@0-1=q8_0
    """
    import reap2gguf
    from reap2gguf.options import BuildOptions
    from reap2gguf.quantizing.labels import hub_note
    from reap2gguf.quantizing.named import one_recipe
    from reap2gguf.terminal.recipe_views import check_as_json, check_lines

    options = BuildOptions(
        recipes=(one_recipe(name),), model=model, compression=0, tensor_types=tensor_types
    )
    plan = reap2gguf.plan(options, progress=screen_progress())
    recipe = plan.recipes[0]
    notes = []
    if note := hub_note(recipe.label):
        notes.append(f"{note}; give another with --label {recipe.name}=LABEL where that matters")
    if as_json:
        say_json(check_as_json(recipe, plan.source.label, notes))
        return
    say_all(check_lines(recipe, plan.source.label))
    for line in notes:
        say(line)


@command("fit")
@model_argument()
@option(
    "--imatrix",
    section=WRITE,
    type=FilePath,
    required=True,
    metavar="FILE",
    help="Importance matrix of MODEL, .gguf or .dat.",
)
@target_options
@sensitivity_option
@option(
    "-o", "--output", section=WRITE, type=FilePath, required=True, help="Recipe (.toml) to write."
)
@overwrite_option
@quantizing_device_option
@threads_option
@llama_cpp_option
@follow_links_option
@output_options
def recipes_fit(
    model: str,
    imatrix: Path,
    target_size: int | None,
    target_bpw: float | None,
    fit: int | None,
    fit_context: int | None,
    sensitivity: str,
    output: Path,
    overwrite: bool,
    device: str,
    threads: int,
    follow_links: bool,
) -> None:
    """Make a recipe whose file has a given size.

    Measures what each type loses of each tensor of MODEL, on sampled rows, and gives every tensor
    the type with which the file loses least. A file beside OUTPUT, whose name ends in
    .type-errors.json, keeps the measurements, so that another target takes seconds.

    \b
    Example:
      reap2gguf recipes fit ./Qwen3-30B-A3B --imatrix imatrix.gguf \\
          --target-size 12GiB -o 12g.toml
      reap2gguf recipes fit ./Qwen3-30B-A3B --imatrix imatrix.gguf \\
          --fit 16GB --fit-context 16384 -o 16gb.toml
      reap2gguf quantize ./Qwen3-30B-A3B --imatrix imatrix.gguf \\
          --recipe 12g.toml -o 12g.gguf
    """
    import reap2gguf

    if [target_size, target_bpw, fit].count(None) != 2:
        raise click.UsageError("pass one of --target-size, --target-bpw and --fit")
    found = reap2gguf.fit_recipe(
        model,
        output,
        imatrix=imatrix,
        target_size=target_size,
        target_bpw=target_bpw,
        fit=fit,
        fit_context=fit_context,
        sensitivity=sensitivity,
        device=device,
        threads=threads,
        overwrite=overwrite,
        follow_links=follow_links,
        progress=terminal_progress(),
    )
    if found.counted is not None:
        say(f"counted {found.counted}")
    say(
        f"{output}: a file of {size(found.n_bytes)}, {found.bits_per_weight:.2f} bpw, "
        f"{found.n_rules} rules",
        "result",
    )


for subcommand in (
    *(recipes_list, recipes_show, recipes_diff, recipes_check, recipes_fit),
    *(recipes_of, recipes_import, recipes_budget),
):
    recipes.add_command(subcommand)
