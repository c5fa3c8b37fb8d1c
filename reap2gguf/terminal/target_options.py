"""Options that say what size a file is to have, where its types are chosen."""

from __future__ import annotations

import click

from reap2gguf.fitting.target import (
    DEFAULT_CONTEXT,
    DEFAULT_SENSITIVITY,
    MOST_BITS,
    SENSITIVITIES,
    WEIGHED_SENSITIVITY,
)
from reap2gguf.terminal.help import MEASURE, WRITE, Number, option, together
from reap2gguf.terminal.option_types import SizeType

target_options = together(
    option(
        "--target-size",
        section=WRITE,
        type=SizeType(),
        metavar="SIZE",
        help="Choose every tensor's type for a file of this size, e.g. 12GiB; the header counts.",
    ),
    option(
        "--target-bpw",
        section=WRITE,
        type=Number(0.1, MOST_BITS),
        metavar="BITS",
        help="The same, for a file of so many bits per weight.",
    ),
    option(
        "--fit",
        section=WRITE,
        type=SizeType(),
        metavar="MEMORY",
        help="The same, for a GPU with so much memory, e.g. 16GB: the KV cache of --fit-context, "
        "a compute buffer and 512 MiB are subtracted.",
    ),
    option(
        "--fit-context",
        section=WRITE,
        type=Number(1),
        metavar="T",
        help="Context in tokens that --fit leaves room for.",
        default_text=str(DEFAULT_CONTEXT),
    ),
)

_SENSITIVITY = (
    "How much an error in each tensor counts where types are chosen for a size: by a table of "
    "kinds, or measured on this model, which takes an evaluation of some dozens of variants."
)
sensitivity_option = option(
    "--sensitivity",
    section=WRITE,
    type=click.Choice(SENSITIVITIES),
    default=DEFAULT_SENSITIVITY,
    help=_SENSITIVITY,
)
build_sensitivity_option = option(
    "--sensitivity",
    section=WRITE,
    type=click.Choice(SENSITIVITIES),
    help=_SENSITIVITY,
    default_text=f"{DEFAULT_SENSITIVITY}; {WEIGHED_SENSITIVITY} where numbers of experts are "
    "weighed",
)
weighed_sensitivity_option = option(
    "--sensitivity",
    section=MEASURE,
    type=click.Choice(SENSITIVITIES),
    default=WEIGHED_SENSITIVITY,
    help="How much an error in each tensor counts in the prediction: by a table of kinds, or "
    "measured on MODEL, which takes an evaluation of some dozens of variants.",
)
