"""The name of a bundle: given, or made from the source's."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from reap2gguf.building.workdir import RESERVED_NAMES
from reap2gguf.bundle.layout import GGUF_SUFFIX, BundleFolders
from reap2gguf.errors import UsageError
from reap2gguf.messages import shown
from reap2gguf.pruning.counts import WEIGHED
from reap2gguf.pruning.methods import MERGING, OBSERVED, method_name

if TYPE_CHECKING:
    from reap2gguf.hub.retry import Note
    from reap2gguf.hub.source import Source
    from reap2gguf.options import BuildOptions
    from reap2gguf.pruning.select import Target

_MOST_LETTERS = 96  # what the Hub allows
_MOST_GIVEN = _MOST_LETTERS - len(GGUF_SUFFIX)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_NAMELESS = "model"  # for a source without a letter that a name may have


def bundle_name(options: BuildOptions, source: Source, target: Target, note: Note) -> str:
    """The given name, or `<source>-REAP-<compression>`, or `<source>` where nothing is pruned.

    Where the number of experts is weighed, it is `<source>-auto-<size>`.
    Where experts are not ranked by one of REAP's criteria, it is `<source>-pruned-<compression>`;
    where they are merged, `<source>-REAM-<compression>` or `<source>-HC-SMoE-<compression>`.
    The ratio has two decimals, or more if needed. Where the Hub does not allow the source's name,
    for its letters or its length, `note` gets the name that is used. Raises UsageError for a given
    name that is not allowed, and if the result would replace the source.
    """
    if options.name is not None:
        name = options.name
        check_given_name(name)
    else:
        ending = _ending(options, target)
        name = _safe(source.short_name, _MOST_LETTERS - len(GGUF_SUFFIX + ending)) + ending
        if name != source.short_name + ending:
            note(
                f"the Hub does not allow {shown(source.short_name + ending)} (it takes letters, "
                f"digits, '.', '_' and '-', in a bundle at most {_MOST_LETTERS - len(GGUF_SUFFIX)} "
                f"of them); the result is called {name}; --name chooses another"
            )
    folders = BundleFolders(options.output, name)
    made = [folders.gguf, *([folders.hf] if target.prunes else [])]
    place = source.folder.resolve()
    if {place, *place.parents} & {folder.resolve() for folder in made}:
        raise UsageError(
            f"{source.folder}: the result would replace the source; pass another --name"
        )
    return name


def check_given_name(name: str) -> None:
    """Raises UsageError for a name that the Hub does not allow for both folders of a bundle."""
    if len(name) > _MOST_GIVEN:
        raise UsageError(
            f"the name {shown(name)} is not allowed: it has {len(name):,} letters, expected at "
            f"most {_MOST_GIVEN}, as the Hub takes {_MOST_LETTERS} and the bundle adds "
            f"{GGUF_SUFFIX}; pass a shorter --name"
        )
    if name in RESERVED_NAMES or name.endswith(GGUF_SUFFIX):
        raise UsageError(
            f"the name {name!r} is not allowed: the build needs names in {GGUF_SUFFIX}, and "
            f"{', '.join(sorted(RESERVED_NAMES))}, for itself; pass another --name"
        )
    if not _hub_allows(name):
        raise UsageError(
            f"the name {name!r} is not allowed; pass --name with letters, digits, '.', '_' and "
            "'-', that begins with a letter or digit, does not end with '-', '.' or '.git', and "
            "has no '--' or '..', as the Hub requires"
        )


def _hub_allows(name: str) -> bool:
    """Whether a repository may have this name, by huggingface_hub's validate_repo_id."""
    is_plain = _NAME.fullmatch(name) is not None and not name.endswith(("-", ".", ".git"))
    return is_plain and "--" not in name and ".." not in name


def _ending(options: BuildOptions, target: Target) -> str:
    if options.weighs and options.target is not None:  # the number of experts is not known yet
        return f"-{WEIGHED}-{options.target.label.removeprefix('FIT-')}"
    if not target.prunes:
        return ""
    ratio = target.compression if options.ratio is None else options.ratio
    shown_ratio = f"{ratio:.2f}" if round(ratio, 2) == ratio else f"{ratio:.4g}"
    how = "pruned"
    if options.kept is None and options.method in OBSERVED:
        how = "REAP"
    elif options.kept is None and options.method in MERGING:
        how = method_name(options.method)
    return f"-{how}-{shown_ratio}"


def _safe(name: str, most: int) -> str:
    """A name of at most `most` letters that the Hub allows and that looks like `name`."""
    if _hub_allows(name) and len(name) <= most:
        safe = name
    else:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")
        words = re.sub(r"[^A-Za-z0-9._]+", "-", plain)
        # the Hub refuses two of these in a row
        safe = re.sub(r"[-.]{2,}", "-", words).strip("-._")[:most].rstrip("-._")
    while safe.endswith((GGUF_SUFFIX, ".git")):  # else both folders could have one name
        safe = safe.removesuffix(GGUF_SUFFIX).removesuffix(".git").rstrip("-.")
    return _NAMELESS if not safe or safe in RESERVED_NAMES else safe
