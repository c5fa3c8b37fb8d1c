"""HTML made of elements: every text is escaped, and no attribute can load anything.

Names in manifests, cards and recipes come from outside. So there is no way to write HTML here but
`element`, which escapes what is not HTML already, and `verbatim` for the package's own files.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from reap2gguf.bundle.markdown import repository
from reap2gguf.messages import one_line

HUB = "https://huggingface.co/"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*", re.ASCII)
_VOID = frozenset({"br", "col", "hr", "input", "meta"})
_LINKS = ("href", "src", "action", "formaction", "data", "poster", "srcset")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | None | Iterable["Child"]
Attribute = str | int | bool | None


def text(value: str) -> Html:
    """A text as it is shown: escaped, with hidden characters written out as in a terminal."""
    return Html(html.escape(one_line(value, 2 * len(value) + 1)))


def lines(value: str) -> Html:
    """A text of several lines, for a `pre`."""
    return Html("\n".join(text(line) for line in value.split("\n")))


def verbatim(value: str) -> Html:
    """HTML, CSS or a script of this package; never text from a file of somebody else."""
    return Html(value)


def together(*children: Child) -> Html:
    """Children one after another."""
    return Html("".join(_shown(child) for child in children))


def _shown(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return text(child)
    return "".join(_shown(one) for one in child)


def element(tag: str, /, *children: Child, **attributes: Attribute) -> Html:
    """An element; `class_` is the attribute `class`, `data_value` is `data-value`.

    An attribute that is None or False is left out; True has no value. Raises ValueError for a name
    that HTML does not know, and for a link that does not go to the Hub or into the page.
    """
    if not _NAME.fullmatch(tag):
        raise ValueError(f"{tag!r} is not the name of an element")
    opening = f"<{tag}{''.join(_attribute(*one) for one in attributes.items())}>"
    if tag in _VOID:
        return Html(opening)
    return Html(f"{opening}{together(*children)}</{tag}>")


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if not _NAME.fullmatch(name) or name.lower().startswith("on") or name == "style":
        raise ValueError(f"{name!r} is not an attribute of this page")
    if value is True:
        return f" {name}"
    if name.lower() in _LINKS and not str(value).startswith(("#", HUB)):
        raise ValueError(f"{name} is {value!r}, expected a place in the page or on the Hub")
    return f' {name}="{text(str(value))}"'


def hub_link(name: str, kind: str = "", shown: str | None = None) -> Html:
    """A link to a repository on the Hub; code if the name cannot be that of one.

    `kind` is "" for models, "datasets/" for datasets.
    """
    label = name if shown is None else shown
    if not repository(name):
        return code(label)
    return element("a", label, href=f"{HUB}{kind}{name}", rel="noreferrer")


def code(value: str) -> Html:
    """A name or a value, in the font of programs."""
    return element("code", value)


def paragraph(*children: Child, class_: str | None = None) -> Html:
    """A paragraph."""
    return element("p", *children, class_=class_)


def absent(*what: Child) -> Html:
    """Says plainly that something was not measured or is not known."""
    return element("p", *what, class_="absent")


def commands(*every: str) -> Html:
    """Commands, one per line, to be copied."""
    return element("pre", element("code", lines("\n".join(every))), tabindex=0)


def section(name: str, title: str, *children: Child) -> Html:
    """A section of the page with its heading; `name` is where links to it go."""
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def details(summary: str, *children: Child) -> Html:
    """What is shown when it is asked for; it is printed open."""
    return element("details", element("summary", summary), *children)
