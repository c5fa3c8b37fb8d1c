"""`reap2gguf recipes`: list, show and check."""

from __future__ import annotations

import click

from reap2gguf.terminal.click_options import output_options
from reap2gguf.terminal.console import say, say_all
from reap2gguf.terminal.help import command
from reap2gguf.terminal.suggestions import Group


@click.group(cls=Group)
def recipes() -> None:
    """List, show and check recipes.

    A recipe says which quant type each tensor gets.

    \b
    Example:
      reap2gguf recipes list
      reap2gguf recipes check my-recipe.toml ./Qwen3-30B-A3B
    """


@command("list")
def recipes_list() -> None:
    """List the included recipes.

    \b
    Example:
      reap2gguf recipes list
    """
    from reap2gguf.quantizing.recipe import load_recipe, shipped_recipes

    say_all(f"{name:<16} {load_recipe(name).title}" for name in shipped_recipes())


@command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Show a recipe, rule by rule.

    NAME is an included recipe or a TOML file.

    \b
    Example:
      reap2gguf recipes show unsloth-iq4km
    """
    from reap2gguf.quantizing.recipe import load_recipe
    from reap2gguf.terminal.views import recipe_lines

    say_all(recipe_lines(load_recipe(name)))


@command("check")
@click.argument("name")
@click.argument("model", required=False)
@output_options
def recipes_check(name: str, model: str | None) -> None:
    """Check that a recipe fits a model.

    NAME is an included recipe or a TOML file; MODEL is the bundled example by default. Reads
    headers only.

    \b
    Example:
      reap2gguf recipes check my-recipe.toml ./Qwen3-30B-A3B
    """
    from reap2gguf.building.plan import make_plan
    from reap2gguf.options import BuildOptions
    from reap2gguf.quantizing.labels import hub_note

    plan = make_plan(BuildOptions(recipes=(name,), model=model, compression=0), say)
    recipe = plan.recipes[0]
    bits = recipe.bits_per_weight
    say(f"{name}: fits {plan.source.label}, {bits:.2f} bits per weight", "result")
    if note := hub_note(recipe.label):
        say(f"{note}; give another with --label {recipe.name}=LABEL where that matters")


for subcommand in (recipes_list, recipes_show, recipes_check):
    recipes.add_command(subcommand)
