"""`reap2gguf jobs`: builds on rented machines."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reap2gguf.errors import JobError, UsageError
from reap2gguf.terminal.build_words import build_arguments, plan_of
from reap2gguf.terminal.click_options import json_option, output_options
from reap2gguf.terminal.console import say, say_all, say_json, say_piece
from reap2gguf.terminal.help import Number, command, option
from reap2gguf.terminal.option_types import FilePath, FolderPath

if TYPE_CHECKING:
    from reap2gguf.jobs.hub_jobs import HubJobs, Job
    from reap2gguf.jobs.order import JobOptions, Order

_words = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="build ...")
_job_id = click.argument("job_id", metavar="ID")
_namespace_option = option(
    "--namespace",
    metavar="OWNER",
    help="Account or organization of the job.",
    default_text="your account",
)
_push_kind = option("--private/--public", default=True, help="Kind of repositories to create.")


@click.group()
def jobs() -> None:
    """Build on rented machines.

    `run` starts a job of Hugging Face Jobs that builds and pushes. `here` is what runs on the
    machine, there or on any other: it saves the work of a build and resumes it elsewhere.

    \b
    Example:
      reap2gguf jobs run --dry-run -- build Qwen/Qwen3-30B-A3B --recipe q4km
      reap2gguf jobs run -- build Qwen/Qwen3-30B-A3B --recipe q4km
    """


@command("run")
@option("--flavor", metavar="NAME", help="Machine.", default_text="the cheapest that fits")
@option("--timeout", metavar="TIME", help="Time limit, e.g. 3h.", default_text="3 x the estimate")
@option(
    "--push",
    "target",
    metavar="OWNER/NAME",
    help="Repositories for the results.",
    default_text="your account, and the bundle's name",
)
@_push_kind
@option(
    "--storage",
    metavar="OWNER/BUCKET",
    help="Bucket for unfinished work; it is created private.",
    default_text="reap2gguf-work of your account",
)
@option("--no-storage", is_flag=True, help="Save no unfinished work: nothing can be resumed.")
@_namespace_option
@option(
    "--ref",
    metavar="REF",
    help="Tag, branch or commit of reap2gguf to install.",
    default_text="that of this version",
)
@option("--package", metavar="URL", help="Install this instead, such as a wheel's URL.")
@option("--image", metavar="IMAGE", help="Docker image with uv and a C compiler.")
@option(
    "--attempts",
    type=Number(1, 10),
    default=1,
    metavar="N",
    help="Times that a failed job is started in all; each resumes the one before.",
)
@option("--detach", is_flag=True, help="Do not follow the log.")
@option("--dry-run", is_flag=True, help="Show what would be sent; send nothing.")
@json_option
@output_options
@_words
def jobs_run(
    words: tuple[str, ...],
    namespace: str | None,
    detach: bool,
    dry_run: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Build on Hugging Face Jobs, and push.

    The machine is the one on which the job costs least. The results go to private repositories.
    Your token travels as a secret. Unfinished work is saved in a private bucket: run the same
    command again to resume a job that was interrupted. Ctrl-C stops following the log, not the job.

    \b
    Example:
      reap2gguf jobs run --dry-run -- build Qwen/Qwen3-30B-A3B --recipe q4km
      reap2gguf jobs run --timeout 3h -- build Qwen/Qwen3-30B-A3B --recipe q4km --recipe q8_0
    """
    from reap2gguf.jobs.hub_jobs import HubJobs

    options = _job_options(arguments)
    hub = None if dry_run else HubJobs(namespace, say)
    order = _order(options, words, hub, namespace)
    if hub is None:
        if as_json:
            say_json(order.as_json())
        else:
            say_all([*order.lines(), *_command_lines(order)])
        return
    if order.request.storage:
        hub.make_bucket(order.request.storage)
    if not as_json:
        say_all(order.lines())
    job = hub.start(order.request)
    if as_json:
        say_json({**order.as_json(), "job": job.as_json()})
    else:
        say(f"started {job.id}  {job.url}", "result")
    if detach or as_json:
        say(f"follow it with: reap2gguf jobs logs {job.id}")
        return
    _follow(hub, job.id)
    say_all(f"{hub.endpoint}/{repo}" for repo in order.repos)


def _job_options(arguments: dict[str, Any]) -> JobOptions:
    """The options of `jobs run` as one value, checked before anything is planned."""
    from reap2gguf.jobs.hub_jobs import checked_bucket
    from reap2gguf.jobs.order import JobOptions, read_timeout

    timeout, storage = arguments["timeout"], arguments["storage"]
    _check_target(arguments["target"])
    return JobOptions(
        arguments["flavor"],
        None if timeout is None else read_timeout(timeout),
        arguments["target"],
        arguments["private"],
        None if storage is None else checked_bucket(storage),
        not arguments["no_storage"],
        arguments["ref"],
        arguments["package"],
        arguments["image"],
        arguments["attempts"],
    )


def _check_target(target: str | None) -> None:
    from reap2gguf.publishing.remote import check_name

    if target is not None:
        check_name(target)


def _order(
    options: JobOptions, words: tuple[str, ...], hub: HubJobs | None, namespace: str | None
) -> Order:
    """Plan the build, and choose the machine."""
    from reap2gguf.jobs.flavors import TABLE
    from reap2gguf.jobs.needs import needs_of
    from reap2gguf.jobs.order import make_order
    from reap2gguf.jobs.request import with_files

    arguments = build_arguments(words, for_elsewhere=True)
    if arguments["model"] is None:
        raise UsageError("MODEL is missing: name one on the Hub, such as Qwen/Qwen3-30B-A3B")
    plan = plan_of(arguments)
    sent, files = with_files(words[1:], arguments["recipes"])
    say(f"{plan.source.label} -> {plan.name}")
    listed = hub.flavors() if hub is not None else None
    owner = namespace if hub is None else hub.namespace
    return make_order(
        options,
        sent,
        files,
        plan.name,
        needs_of(plan),
        listed or TABLE,
        owner,
        is_listed=listed is not None,
    )


def _command_lines(order: Order) -> Iterable[str]:
    yield "  command:"
    for line in order.request.script.splitlines():
        yield f"    {line}"
    yield "nothing was sent"


@command("needs")
@option(
    "--sky",
    type=FilePath,
    metavar="FILE",
    help="Print a task for SkyPilot instead, made from deploy/skypilot.yaml.",
)
@option("--push", "target", metavar="OWNER/NAME", help="Repositories for the task's results.")
@output_options
@_words
def jobs_needs(words: tuple[str, ...], sky: Path | None, target: str | None) -> None:
    """Show what a build needs of a machine.

    Prints JSON: GPU memory, memory, disk and time of a plan, for a machine that has nothing yet.

    \b
    Example:
      reap2gguf jobs needs -- build Qwen/Qwen3-30B-A3B --recipe q4km
      reap2gguf jobs needs --sky deploy/skypilot.yaml --push owner/name -- build owner/model \\
        --recipe q4km > task.yaml
    """
    from reap2gguf.jobs.needs import needs_of

    _check_target(target)
    arguments = build_arguments(words, for_elsewhere=sky is not None)
    if sky is not None and any(Path(recipe).is_file() for recipe in arguments["recipes"]):
        raise UsageError("--recipe names a file, which this task does not send; name a recipe")
    plan = plan_of(arguments)
    needs = needs_of(plan)
    if sky is None:
        say_json({"name": plan.name, **needs.as_json()})
        return
    from reap2gguf.jobs.sky import sky_task

    say_piece(sky_task(sky, needs, words[1:], target))


@command("here")
@option(
    "--output",
    type=FolderPath,
    default=Path("build"),
    metavar="DIR",
    help="Folder on a local disk.",
)
@option("--storage", type=FolderPath, metavar="DIR", help="Mounted bucket or volume for the work.")
@option("--push", "target", metavar="OWNER/NAME", help="Publish the finished bundle.")
@_push_kind
@option(
    "--save-seconds",
    type=Number(1, 86400),
    default=60,
    metavar="S",
    help="Time between two saved states, at least.",
)
@output_options
@_words
def jobs_here(
    words: tuple[str, ...],
    output: Path,
    storage: Path | None,
    target: str | None,
    private: bool,
    save_seconds: int,
) -> None:
    """Build on this machine, saved elsewhere.

    Restores the work in --storage, builds, saves the work while it runs, and pushes the bundle. For
    machines that may be taken away: the same command on another machine resumes. The build works
    in --output, on a local disk; --storage needs neither locks nor renames.

    \b
    Example:
      reap2gguf jobs here --storage /mnt/qwen -- build Qwen/Qwen3-30B-A3B --recipe q4km
    """
    from reap2gguf.jobs.here import HereOptions, work_here

    build_arguments(words, for_elsewhere=False)
    _check_target(target)
    options = HereOptions(words[1:], output, storage, target, private, save_seconds)
    if code := work_here(options, say):
        sys.exit(code)


@command("list")
@_namespace_option
@json_option
@output_options
def jobs_list(namespace: str | None, as_json: bool) -> None:
    """List jobs of reap2gguf.

    \b
    Example:
      reap2gguf jobs list
    """
    from reap2gguf.jobs.hub_jobs import HubJobs

    found = HubJobs(namespace, say).all()
    if as_json:
        say_json([job.as_json() for job in found])
    elif found:
        say_all(map(_job_line, found))
    else:
        say("no jobs of reap2gguf", "result")


@command("status")
@_job_id
@_namespace_option
@json_option
@output_options
def jobs_status(job_id: str, namespace: str | None, as_json: bool) -> None:
    """Show what a job is doing.

    \b
    Example:
      reap2gguf jobs status 687fb701029421ae5549d998
    """
    from reap2gguf.jobs.hub_jobs import HubJobs

    job = HubJobs(namespace, say).look(job_id)
    if as_json:
        say_json(job.as_json())
    else:
        say(_job_line(job), "result")


@command("logs")
@_job_id
@option("--follow/--no-follow", default=True, help="Wait for more until the job ends.")
@_namespace_option
@output_options
def jobs_logs(job_id: str, follow: bool, namespace: str | None) -> None:
    """Print and follow a job's log.

    Exits with 2 if the job failed. Ctrl-C stops following, not the job.

    \b
    Example:
      reap2gguf jobs logs 687fb701029421ae5549d998
    """
    from reap2gguf.jobs.hub_jobs import HubJobs

    hub = HubJobs(namespace, say)
    if follow:
        _follow(hub, job_id)
    else:
        say_all(hub.logs(job_id, follow=False))


@command("cancel")
@_job_id
@_namespace_option
@output_options
def jobs_cancel(job_id: str, namespace: str | None) -> None:
    """End a job. Its saved work remains.

    \b
    Example:
      reap2gguf jobs cancel 687fb701029421ae5549d998
    """
    from reap2gguf.jobs.hub_jobs import HubJobs

    HubJobs(namespace, say).cancel(job_id)
    say(f"{job_id}: canceled", "result")


def _follow(hub: HubJobs, job_id: str) -> None:
    """Print a job's log until it ends. Raises JobError if it failed."""
    try:
        say_all(hub.logs(job_id, follow=True))
        job = hub.wait(job_id)
    except KeyboardInterrupt:
        say(
            f"Stopped following; the job keeps running. Follow: reap2gguf jobs logs {job_id}; "
            f"end it: reap2gguf jobs cancel {job_id}",
            "error",
        )
        sys.exit(130)
    if job.stage != "COMPLETED":
        reason = f" ({job.message})" if job.message else ""
        advice = "run the same `jobs run` again to resume" if job.has_ended else "look again later"
        raise JobError(f"{job_id}: {job.stage.lower()}{reason}; {advice}")
    say(_job_line(job), "result")


def _job_line(job: Job) -> str:
    from reap2gguf.messages import duration

    ran = f", {duration(job.seconds)}" if job.seconds is not None else ""
    reason = f", {job.message}" if job.message else ""
    return f"{job.id}  {job.stage.lower()}{reason}{ran}, {job.flavor}  {job.name}  {job.url}"


for _command in (jobs_run, jobs_here, jobs_needs):
    _command.allow_interspersed_args = False  # the options of `build` are not theirs
for _command in (jobs_run, jobs_here, jobs_needs, jobs_list, jobs_status, jobs_logs, jobs_cancel):
    jobs.add_command(_command)
