"""The options that say which experts go, for every command that removes some."""

from __future__ import annotations

import click

from reap2gguf.options import MTP_CHOICES
from reap2gguf.pruning.methods import FROM_WEIGHTS, METHODS, OBSERVED
from reap2gguf.terminal.help import PRUNE, option, together
from reap2gguf.terminal.option_types import FilePath

pruning_options = together(
    option(
        "--kept",
        section=PRUNE,
        type=FilePath,
        metavar="FILE",
        help="Keep the experts that a JSON file names: kept_experts.json of `prune`, or ids by "
        "layer.",
    ),
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
    option(
        "--method",
        section=PRUNE,
        type=click.Choice(METHODS),
        default="reap",
        metavar="NAME",
        help=f"How to rank the experts, by what is observed of them: {', '.join(OBSERVED)}; or by "
        f"their weights alone: {', '.join(FROM_WEIGHTS)}.",
    ),
    option(
        "--protect",
        section=PRUNE,
        default="",
        show_default=False,
        metavar="LAYER:EXPERT,...",
        help="Experts that stay whatever they score: 3:17, ranges as in 0-3:5-8, or '*:3' for "
        "every layer.",
    ),
    option(
        "--protect-super-experts",
        section=PRUNE,
        is_flag=True,
        help="Keep the few experts whose outputs have outliers, on which attention may depend.",
    ),
    option(
        "--mtp",
        section=PRUNE,
        type=click.Choice(MTP_CHOICES),
        default="prune",
        help="Multi-token-prediction block: prune it like the layers, or drop it.",
    ),
)
