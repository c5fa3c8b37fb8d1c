"""`reap2gguf push`: publish a finished bundle on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reap2gguf.messages import one_line
from reap2gguf.terminal.options import FolderPath, SizeType, threads_option

if TYPE_CHECKING:
    from reap2gguf.publishing.push import Preview


@click.command()
@click.argument("bundle", type=FolderPath)
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make repositories that only you can see.")
@click.option(
    "--max-file-size", "max_bytes", type=SizeType(), default="50GB", show_default=True,
    metavar="SIZE", help="Cut GGUF files above this into parts, as llama.cpp does.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded, and upload nothing.")
@threads_option
def push(
    bundle: Path, repo: str, private: bool, max_bytes: int, dry_run: bool, threads: int
) -> None:
    """Publish BUNDLE on the Hub: safetensors as OWNER/NAME, GGUF files as OWNER/NAME-GGUF.

    BUNDLE is either folder that `build` left. Files are checked before, and read back after.
    Stopped at any point, the same command goes on and sends only what is not there. Log in with
    `hf auth login`.

    \b
    Example:
      reap2gguf push build/Qwen3-30B-A3B-REAP-0.25 owner/Qwen3-30B-A3B-REAP-0.25 --dry-run
      reap2gguf push build/Qwen3-30B-A3B-REAP-0.25 owner/Qwen3-30B-A3B-REAP-0.25 --private
    """
    from reap2gguf.publishing.push import PushOptions, preview
    from reap2gguf.publishing.push import push as publish
    from reap2gguf.terminal.console import terminal_progress

    options = PushOptions(bundle, repo, private, max_bytes, threads)
    if dry_run:
        for line in preview_lines(preview(options, terminal_progress()), private):
            click.echo(one_line(line))
        return
    published = publish(options, terminal_progress())
    for other in published.others:
        click.echo(one_line(f"{other} was there before, and stays"), err=True)
    for url in published.urls:
        click.echo(one_line(url))


def preview_lines(found: Preview, private: bool) -> Iterator[str]:
    """What a push would do, file by file."""
    from reap2gguf.messages import size

    for repo in found.prepared.repos:
        yield f"{repo.repo}  {size(repo.n_bytes)}, {_kind(found, repo.repo, private)}"
        width = max(len(file.name) for file in repo.files)
        for file in repo.files:
            state = found.state(repo.repo, file) if found.remote is not None else ""
            yield f"  {file.name:<{width}}  {size(file.n_bytes):>12}  {state}".rstrip()
        if found.remote is not None:
            for name in found.outdated.get(repo.repo, ()):
                yield f"  {name:<{width}}  {'':>12}  of an earlier push, to be removed"
            files = found.to_upload(repo.repo)
            count = f"{len(files)} file{'' if len(files) == 1 else 's'}"
            yield f"  {count} to upload, {size(sum(file.n_bytes for file in files))}"
        yield ""
    for plan in found.prepared.splits:
        yield f"{plan.header.path.name} is cut into {len(plan.parts)} parts"
    for what in found.unchecked:
        yield f"not checked: {what}"
    yield "nothing was uploaded"


def _kind(found: Preview, repo: str, private: bool) -> str:
    if found.remote is None:
        return "private" if private else "public"
    there = found.remote.get(repo)
    if there is None:
        return f"to be made, {'private' if private else 'public'}"
    return f"exists, {'private' if there.is_private else 'public'}"
