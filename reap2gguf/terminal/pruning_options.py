"""Options that say what is pruned, and by which method."""

from __future__ import annotations

import click

from reap2gguf.choosing.names import AUTO, BUILD_METHODS, CANDIDATES
from reap2gguf.options import MTP_CHOICES
from reap2gguf.pruning.methods import METHODS, OBSERVED
from reap2gguf.terminal.help import PRUNE, option, together
from reap2gguf.terminal.option_types import FilePath

count_options = together(
    option(
        "--keep-experts",
        section=PRUNE,
        type=int,
        metavar="N",
        help="Number of experts to keep per layer.",
    ),
    option(
        "--compression",
        section=PRUNE,
        type=float,
        metavar="R",
        help="Share of experts to remove, in place of --keep-experts: floor(E x R) per layer.",
        default_text="0.25",
    ),
)

mtp_option = option(
    "--mtp",
    section=PRUNE,
    type=click.Choice(MTP_CHOICES),
    default="prune",
    help="Multi-token-prediction block: prune it like the layers, or drop it.",
)

pruning_options = together(
    count_options,
    option(
        "--method",
        section=PRUNE,
        type=click.Choice(METHODS),
        default="reap",
        metavar="NAME",
        help=f"How to rank the experts: {', '.join(METHODS)}.",
    ),
    mtp_option,
)

candidates_option = option(
    "--candidates",
    section=PRUNE,
    metavar="NAME,...",
    help=f"Methods that are measured: names with commas of {', '.join(OBSERVED)}, or all.",
    default_text=",".join(CANDIDATES),
)

choose_text_option = option(
    "--choose-text",
    section=PRUNE,
    type=FilePath,
    metavar="FILE",
    help="Text of another domain that they are measured on too.",
    default_text="prose, mathematics, science and languages, which are built in",
)

build_pruning_options = together(
    count_options,
    option(
        "--method",
        section=PRUNE,
        type=click.Choice(BUILD_METHODS),
        default="reap",
        metavar="NAME",
        help=f"How to rank the experts: {', '.join(METHODS)}; or {AUTO}, which measures several "
        "and takes the best.",
    ),
    candidates_option,
    choose_text_option,
    mtp_option,
)
