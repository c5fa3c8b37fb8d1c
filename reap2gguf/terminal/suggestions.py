"""What to say of a command or an option that does not exist: the name here, or a near one.

People come from other programs: llama.cpp, AutoRound, mlx_lm, mergekit, vLLM, Ollama, hf and git.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import click

from reap2gguf.terminal.help import COMMAND_HEADINGS

_ALIKE = 0.75  # how alike two names must be, so that no guess is silly

# What others call it, and what to use here.
COMMANDS = {
    "upload": "`reap2gguf push`",
    "publish": "`reap2gguf push`",
    "convert": "`reap2gguf quantize`",
    "quantise": "`reap2gguf quantize`",
    "quant": "`reap2gguf quantize`",
    "export": "`reap2gguf quantize`",
    "gguf": "`reap2gguf quantize`",
    "llama-quantize": "`reap2gguf quantize`",
    "llama-imatrix": "`reap2gguf imatrix`",
    "importance": "`reap2gguf imatrix`",
    "dry-run": "`reap2gguf plan`",
    "dryrun": "`reap2gguf plan`",
    "estimate": "`reap2gguf plan`",
    "all": "`reap2gguf build`",
    "make": "`reap2gguf build`",
    "compress": "`reap2gguf build`",
    "run": "`reap2gguf build` to make a model, `reap2gguf chat` to try one",
    "generate": "`reap2gguf chat`",
    "llama-cli": "`reap2gguf chat`",
    "server": "`reap2gguf serve`",
    "llama-server": "`reap2gguf serve`",
    "check": "`reap2gguf verify` for a bundle, `reap2gguf doctor` for this machine",
    "validate": "`reap2gguf verify`",
    "test": "`reap2gguf verify`",
    "calibrate": "`reap2gguf observe`",
    "saliency": "`reap2gguf observe`",
    "recipe": "`reap2gguf recipes`",
    "version": "`reap2gguf --version`",
    "env": "`reap2gguf doctor`",
    "login": "`hf auth login`",
    "download": "owner/name as MODEL: a model on the Hub is fetched while it is read",
}
OPTIONS = {
    "--push": "`reap2gguf push` after the build",
    "--upload": "`reap2gguf push` after the build",
    "--upload-repo": "`reap2gguf push` after the build",
    "--push-to-hub": "`reap2gguf push` after the build",
    "--yes": "the command without it: nothing asks for confirmation",
    "-y": "--yes",
    "--force": "--overwrite",
    "--overwrite": "--fresh to start from scratch",
    "--resume": "the same command again: it resumes by itself",
    "--hf-path": "--model",
    "--model-name": "--model",
    "--model-path": "--model",
    "--model-id": "--model",
    "--repo": "--model",
    "--out": "--output",
    "--outfile": "--output",
    "--out-dir": "--output",
    "--output-dir": "--output",
    "--output_dir": "--output",
    "--mlx-path": "--output",
    "--format": "--recipe",
    "--scheme": "--recipe",
    "--outtype": "--recipe",
    "--qtype": "--recipe",
    "--quant": "--recipe",
    "--type": "--recipe",
    "--ratio": "--compression",
    "--sparsity": "--compression",
    "--compression-ratio": "--compression",
    "--prune-ratio": "--compression",
    "--num-experts": "--keep-experts",
    "--n-experts": "--keep-experts",
    "--dataset": "--calibration",
    "--dataset-name": "--calibration",
    "--data": "--calibration",
    "--calib": "--calibration",
    "--nsamples": "--samples",
    "--num-samples": "--samples",
    "--n-samples": "--samples",
    "--seqlen": "--max-length",
    "--seq-len": "--max-length",
    "--max-seq-len": "--max-length",
    "--ctx-size": "--context",
    "--n-gpu-layers": "--gpu-layers",
    "--cuda": "--device cuda",
    "--cpu": "--device cpu",
    "--gpu": "--device cuda",
    "--debug": "--verbose",
    "--silent": "--quiet",
}


def for_command(name: str, known: Iterable[str]) -> str:
    """What to use in place of a command, as "; use ..."; empty if nothing comes close."""
    if advice := COMMANDS.get(name.lower()):
        return f"; use {advice}"
    return _close(name.lower(), known)


def for_option(name: str, known: Iterable[str]) -> str:
    """The same for an option of a command that has the options `known`."""
    known = list(known)
    asked = name.lower().replace("_", "-")
    advice = OPTIONS.get(asked, "")
    if advice in OPTIONS and advice not in known:
        advice = OPTIONS[advice]
    # an option is advised to those commands alone that have it
    if advice and (not advice.startswith("-") or advice.split()[0] in known):
        return f"; use {advice}"
    return _close(asked, [option for option in known if option.startswith("--")])


def _close(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=2, cutoff=_ALIKE)
    return f"; did you mean {' or '.join(found)}?" if found else ""


class Group(click.Group):
    """A group whose error about an unknown command says what to use.

    Its help lists the commands under the headings of `help.COMMAND_HEADINGS`, each summary whole.
    """

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        left = {name: self.commands[name] for name in self.list_commands(ctx)}
        for heading, names in (*COMMAND_HEADINGS.items(), ("Commands", tuple(left))):
            found = [(name, left.pop(name)) for name in names if name in left]
            if found:
                with formatter.section(heading):
                    lines = [(name, (one.help or "").partition("\n")[0]) for name, one in found]
                    formatter.write_dl(lines)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            advice = for_command(name, self.list_commands(ctx))
            ctx.fail(f"there is no command '{name}'{advice}")
        return super().resolve_command(ctx, args)


def option_message(error: click.NoSuchOption) -> str:
    """The message for an option that a command does not have."""
    parameters = [] if error.ctx is None else error.ctx.command.params
    known = [name for parameter in parameters for name in parameter.opts]
    return f"there is no option {error.option_name}{for_option(error.option_name, known)}"
