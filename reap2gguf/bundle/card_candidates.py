"""How the method of pruning was chosen, in a card: the candidates, what each cost, and the rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.bundle.card_quality import figure
from reap2gguf.bundle.markdown import code, inline, table

if TYPE_CHECKING:
    from reap2gguf.bundle.choice import CandidateRecord, ChoiceRecord, ChoiceText, Figures
    from reap2gguf.bundle.manifest import Manifest


def candidates_section(manifest: Manifest) -> str:
    """The table of candidates; "" if the method was named, or nothing was pruned."""
    choice = manifest.choice
    if choice is None:
        return ""
    header = ["method", "KL, held-out rows", "perplexity"]
    if choice.other is not None:
        header += ["KL, other text", "perplexity"]
    ordered = sorted(choice.candidates, key=lambda one: one.held_out.divergence.value)
    source = ["source", "0", figure(choice.held_out.perplexity)]
    if choice.other is not None:
        source += ["0", figure(choice.other.perplexity)]
    rows = [source, *(_row(choice, one) for one in ordered)]
    intro = (
        f"{code(choice.chosen)} was chosen among {len(choice.candidates)} methods by what each "
        f"costs this model at this number of experts. {_texts(choice)} KL divergences are from the "
        "source, in nats per token; ± is one standard error."
    )
    return "\n\n".join(("## Method", intro, table(header, rows), _rule(choice)))


def _row(choice: ChoiceRecord, one: CandidateRecord) -> list[str]:
    name = code(one.name)
    if one.name == choice.chosen:
        name = f"**{name}**"
    if one.same_as is not None:
        name += f" (keeps the same experts as {code(one.same_as)})"
    cells = [name, *_cells(one.held_out)]
    return cells if one.other is None else [*cells, *_cells(one.other)]


def _cells(figures: Figures) -> list[str]:
    return [figure(figures.divergence), figure(figures.perplexity)]


def _texts(choice: ChoiceRecord) -> str:
    held = f"The texts are {_text(choice.held_out)} of the calibration, which ranked no experts"
    if choice.other is None:
        return f"{held}."
    return f"{held}, and {_text(choice.other)} of another text ({inline(choice.other.label)})."


def _text(text: ChoiceText) -> str:
    return f"{text.n_rows:,} rows ({text.n_scored:,} scored tokens)"


def _rule(choice: ChoiceRecord) -> str:
    if choice.other is None:
        return "The method with the lowest KL divergence on the held-out rows was taken."
    return (
        "The method with the lowest KL divergence on the held-out rows was taken, among those that "
        "are not worse on the other text than the best one there by more than two standard errors "
        "of the difference."
    )
