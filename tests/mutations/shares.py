"""What the long tests ask of each way to notice damage."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tests.mutations.damage import Damage
from tests.mutations.models import FAMILIES, Sound, make, more_models
from tests.mutations.runs import Report, Run, catalog, run_all

MODELS = (*FAMILIES, *map(str, more_models()))
# The keys and fields that both families have are damaged one by one in the smaller model alone,
# which is much faster to check. Models that the environment names get everything.
_LARGER, _SMALLER = FAMILIES
_ONE_BY_ONE = re.compile(r"[KCM] .*: (?:removed|another type|another value)")
_FEWEST = 250
# `verify` with the source makes every check that it makes without, and all damages are done to that
# (test_beside.py): of what it finds by headers and records alone, each of so many is done again.
_SAMPLED = "KMPFC"
_EACH = 4


def check(run: Run, model: str, folder: Path, least: float) -> None:
    """Do every damage to a model; at least this share must be caught, and nothing sound refused."""
    report = run_all(run, made(model, folder), chosen(run, model, folder), folder)
    assert len(report.outcomes) >= _FEWEST, len(report.outcomes)
    crashed = [str(outcome) for outcome in report.outcomes if outcome.crashed]
    assert not crashed, "\n".join(["ended with a traceback:", *crashed])
    alarms = list(map(str, report.false_alarms))
    assert not alarms, "\n".join(["harmless, and not passed:", *alarms])
    assert report.share >= least, _words(report, least)


def chosen(run: Run, model: str, folder: Path) -> list[Damage]:
    """The damages that a model gets."""
    damages = catalog(made(model, folder))
    if model == _LARGER:
        done = {_bare(one) for one in catalog(made(_SMALLER, folder))}
        damages = [one for one in damages if not _is_one_by_one(one) or _bare(one) not in done]
    if run is Run.SOURCE and model in FAMILIES:
        again = [one for one in damages if _is_found_beside(one)][::_EACH]
        damages = [one for one in damages if not _is_found_beside(one) or one in again]
    return damages


def _is_found_beside(damage: Damage) -> bool:
    """Whether the bundle alone shows it, by other things than the values of tensors."""
    return damage.group in _SAMPLED and Run.BESIDE.must_catch(damage)


def _is_one_by_one(damage: Damage) -> bool:
    return _ONE_BY_ONE.fullmatch(str(damage)) is not None


def _bare(damage: Damage) -> str:
    """The name of a damage, whatever the architecture is called."""
    return re.sub(r"qwen35?moe\.|text_config\.", "", str(damage))


@cache
def made(model: str, folder: Path) -> Sound:
    """The sound bundle of a model, made once per folder."""
    place = folder / Path(model).name
    place.mkdir()
    return make(model, place)


def _words(report: Report, least: float) -> str:
    missed = "\n".join(f"  {outcome.damage}" for outcome in report.missed)
    return (
        f"{report.share:.1%} of {len(report.required)} damages were caught, expected at least "
        f"{least:.0%}; missed:\n{missed}"
    )
