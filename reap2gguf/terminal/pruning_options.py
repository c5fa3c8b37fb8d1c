"""Options that say what is pruned, and by which method."""

from __future__ import annotations

import click

from reap2gguf.choosing.names import AUTO, BUILD_METHODS, CANDIDATES
from reap2gguf.options import DEQUANTIZE_CHOICES, MTP_CHOICES, REPAIR_CHOICES
from reap2gguf.pruning.counts import WEIGHED
from reap2gguf.pruning.methods import FROM_WEIGHTS, GROUP_SIZE, MERGING, METHODS, OBSERVED
from reap2gguf.terminal.help import PRUNE, Number, option, together
from reap2gguf.terminal.option_types import CompressionType, FilePath, RatiosType

kept_option = option(
    "--kept",
    section=PRUNE,
    type=FilePath,
    metavar="FILE",
    help="Keep the experts that a JSON file names: kept_experts.json of `prune`, or ids by layer.",
)

criterion_option = option(
    "--method",
    section=PRUNE,
    type=click.Choice(tuple(OBSERVED)),
    default="reap",
    metavar="NAME",
    help=f"How to rank the experts: {', '.join(OBSERVED)}.",
)

ratios_option = option(
    "--ratios",
    section=PRUNE,
    type=RatiosType(),
    metavar="R,R,...",
    help="Shares of the experts to remove, such as 0.25 or 25%.",
    default_text="0.125,0.25,0.375,0.5",
)

keep_experts_option = option(
    "--keep-experts",
    section=PRUNE,
    type=int,
    metavar="N",
    help="Number of experts to keep per layer.",
)

count_options = together(
    keep_experts_option,
    option(
        "--compression",
        section=PRUNE,
        type=float,
        metavar="R",
        help="Share of experts to remove, in place of --keep-experts: floor(E x R) per layer.",
        default_text="0.25",
    ),
)

protect_options = together(
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
)

mtp_option = option(
    "--mtp",
    section=PRUNE,
    type=click.Choice(MTP_CHOICES),
    default="prune",
    help="Multi-token-prediction block: prune it like the layers, or drop it.",
)

repair_option = option(
    "--repair",
    section=PRUNE,
    is_flag=False,
    flag_value="ridge",
    type=click.Choice(REPAIR_CHOICES),
    default="none",
    help="Fit the kept experts' down_proj to what all experts gave on the calibration text: ridge "
    "(for --repair alone), or scale, which is one number per expert.",
)

dequantize_option = option(
    "--dequantize",
    section=PRUNE,
    type=click.Choice(DEQUANTIZE_CHOICES),
    help="Write the safetensors of a quantized MODEL (FP8, MXFP4, int4) in this type.",
    default_text="as MODEL stores them",
)

group_size_option = option(
    "--group-size",
    section=PRUNE,
    type=Number(2),
    metavar="N",
    help="With --method ream, how many experts may become one.",
    default_text=str(GROUP_SIZE),
)

_RANKED_BY = (
    f"How to rank the experts, by what is observed of them: {', '.join(OBSERVED)}; or by their "
    f"weights alone: {', '.join(FROM_WEIGHTS)}; or how to merge them into those that stay, in "
    f"place of removing any: {', '.join(MERGING)}"
)

pruning_options = together(
    kept_option,
    count_options,
    option(
        "--method",
        section=PRUNE,
        type=click.Choice(METHODS),
        default="reap",
        metavar="NAME",
        help=f"{_RANKED_BY}.",
    ),
    group_size_option,
    protect_options,
    mtp_option,
    dequantize_option,
)

candidates_option = option(
    "--candidates",
    section=PRUNE,
    metavar="NAME,...",
    help="Methods that are measured, with commas: criteria and best+repair, or all of these. "
    "`choose` measures ream and hc_smoe too, if they are named.",
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
    kept_option,
    keep_experts_option,
    option(
        "--compression",
        section=PRUNE,
        type=CompressionType(),
        metavar="R|auto",
        help="Share of experts to remove, in place of --keep-experts: floor(E x R) per layer; or "
        f"{WEIGHED}, which divides --target-size or --fit between experts and bits.",
        default_text="0.25",
    ),
    option(
        "--method",
        section=PRUNE,
        type=click.Choice(BUILD_METHODS),
        default="reap",
        metavar="NAME",
        help=f"{_RANKED_BY}; or {AUTO}, which measures several and takes the best.",
    ),
    candidates_option,
    choose_text_option,
    group_size_option,
    protect_options,
    mtp_option,
    repair_option,
    dequantize_option,
)
