"""`reap2gguf push`: publish a finished bundle on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reap2gguf.messages import size
from reap2gguf.progress import working
from reap2gguf.terminal.click_options import (
    json_option,
    output_options,
)
from reap2gguf.terminal.compute_options import (
    threads_option,
)
from reap2gguf.terminal.console import say, say_all, say_json, terminal_progress
from reap2gguf.terminal.help import command, option
from reap2gguf.terminal.option_types import FolderPath, SizeType

if TYPE_CHECKING:
    from reap2gguf.publishing.push import Preview


@command()
@click.argument("bundle", type=FolderPath)
@click.argument("repo", metavar="OWNER/NAME")
@option("--private", is_flag=True, help="Create private repositories.")
@option(
    "--max-file-size",
    "max_bytes",
    type=SizeType(),
    default="50GB",
    metavar="SIZE",
    help="Split larger GGUF files into parts, as llama.cpp does.",
)
@option("--dry-run", is_flag=True, help="Show what would be uploaded; upload nothing.")
@threads_option
@json_option
@output_options
def push(
    bundle: Path,
    repo: str,
    private: bool,
    max_bytes: int,
    dry_run: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Publish a bundle on the Hub.

    BUNDLE is one of the two folders of a build. The safetensors go to OWNER/NAME, the GGUF files to
    OWNER/NAME-GGUF. Files are checked before the upload and read back after it. To resume an
    interrupted push, run the same command again: only missing files are sent. Log in with
    `hf auth login`.

    \b
    Example:
      reap2gguf push build/Qwen3-30B-A3B-REAP-0.25 owner/Qwen3-30B-A3B-REAP-0.25 --dry-run
      reap2gguf push build/Qwen3-30B-A3B-REAP-0.25 owner/Qwen3-30B-A3B-REAP-0.25 --private
    """
    progress = terminal_progress()
    with working(progress, f"Reading {bundle}"):
        from reap2gguf.publishing.push import PushOptions, preview
        from reap2gguf.publishing.push import push as publish
        from reap2gguf.terminal.json_views import preview_as_json, published_as_json
        from reap2gguf.verifying.bundle import check_bundle

    options = PushOptions(bundle, repo, private, max_bytes, threads)
    with working(progress, f"Asking the Hub about {repo}"):
        if dry_run:
            found = preview(options, check_bundle, progress)
        else:
            published = publish(options, check_bundle, progress)
    if dry_run:
        if as_json:
            say_json(preview_as_json(found))
        else:
            say_all(preview_lines(found, private))
        return
    for other in published.others:
        say(f"{other} is not part of this bundle; it remains in the repository")
    if as_json:
        say_json(published_as_json(published))
    else:
        say_all(published.urls)


def preview_lines(found: Preview, private: bool) -> Iterator[str]:
    """What a push would do, file by file."""
    for repo in found.prepared.repos:
        yield f"{repo.repo}  {size(repo.n_bytes)}, {_kind(found, repo.repo, private)}"
        width = max(len(file.name) for file in repo.files)
        for file in repo.files:
            state = found.state(repo.repo, file) if found.remote is not None else ""
            yield f"  {file.name:<{width}}  {size(file.n_bytes):>12}  {state}".rstrip()
        if found.remote is not None:
            for name in found.outdated.get(repo.repo, ()):
                yield f"  {name:<{width}}  {'':>12}  from an earlier push, will be removed"
            files = found.to_upload(repo.repo)
            count = f"{len(files)} file{'' if len(files) == 1 else 's'}"
            yield f"  {count} to upload, {size(sum(file.n_bytes for file in files))}"
        yield ""
    for plan in found.prepared.splits:
        yield f"{plan.header.path.name} will be split into {len(plan.parts)} parts"
    for warning in found.prepared.warnings:
        yield f"warning: {warning}"
    for what in found.unchecked:
        yield f"not checked: {what}"
    yield "nothing was uploaded"


def _kind(found: Preview, repo: str, private: bool) -> str:
    if found.remote is None:
        return "private" if private else "public"
    existing = found.remote.get(repo)
    if existing is None:
        return f"will be created, {'private' if private else 'public'}"
    return f"exists, {'private' if existing.is_private else 'public'}"
