"""`reap2gguf recipes`: list, show and check."""

from __future__ import annotations

import click

from reap2gguf.messages import one_line


@click.group()
def recipes() -> None:
    """List, show and check tensor-precision recipes.

    \b
    Example:
      reap2gguf recipes list
      reap2gguf recipes check my-recipe.toml ./Qwen3-30B-A3B
    """


@recipes.command("list")
def recipes_list() -> None:
    """The recipes that come with the program.

    \b
    Example:
      reap2gguf recipes list
    """
    from reap2gguf.quantizing.recipe import load_recipe, shipped_recipes

    for name in shipped_recipes():
        click.echo(f"{name:<16} {load_recipe(name).title}")


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """One recipe, rule by rule.

    \b
    Example:
      reap2gguf recipes show unsloth-iq4km
    """
    from reap2gguf.quantizing.recipe import load_recipe
    from reap2gguf.terminal.views import recipe_lines

    for line in recipe_lines(load_recipe(name)):
        click.echo(one_line(line))


@recipes.command("check")
@click.argument("name")
@click.argument("model", required=False)
def recipes_check(name: str, model: str | None) -> None:
    """Resolve a recipe against MODEL (the bundled example by default), reading only headers.

    \b
    Example:
      reap2gguf recipes check my-recipe.toml ./Qwen3-30B-A3B
    """
    from reap2gguf.building.plan import make_plan
    from reap2gguf.options import BuildOptions

    plan = make_plan(BuildOptions(recipes=(name,), model=model, compression=0))
    resolved = plan.recipes[0]
    click.echo(f"{name}: fits {plan.source.label}, {resolved.bits_per_weight:.2f} bits per weight")
