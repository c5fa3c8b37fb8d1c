"""The page: its sections in order, its style and script inside, and nothing from elsewhere.

A policy in the page's head forbids every request, and every script but the page's own, whose hash
it names. The same facts make the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from reap2gguf import __version__
from reap2gguf.reporting.answers import speeds, tasks
from reap2gguf.reporting.damage import damage
from reap2gguf.reporting.experts import experts
from reap2gguf.reporting.file_list import files as file_section
from reap2gguf.reporting.html import Html, element, together, verbatim
from reap2gguf.reporting.making import calibration, caveats, provenance
from reap2gguf.reporting.overview import head, summary
from reap2gguf.reporting.precision import precision
from reap2gguf.reporting.running import running

if TYPE_CHECKING:
    from reap2gguf.reporting.facts import ReportFacts

_CONTENTS = (
    ("summary", "What was done"),
    ("files", "Files"),
    ("damage", "What it cost"),
    ("tasks", "Tasks"),
    ("speed", "Speed"),
    ("experts", "Experts"),
    ("bits", "Bits per weight"),
    ("run", "How to run it"),
    ("calibration", "Calibration"),
    ("caveats", "What to know"),
    ("provenance", "How it was made"),
)


def page(facts: ReportFacts) -> str:
    """The whole page. Memory: some 20 bytes per expert of every layer, beside the facts."""
    style, script = _own("style.css"), _own("script.js")
    body = element(
        "body",
        element("a", "To the report", href="#summary", class_="skip"),
        element("div", _contents(), element("main", head(facts), _sections(facts)), class_="page"),
        _foot(facts),
        element("script", verbatim(script)),
    )
    root = element("html", _head(facts, style, script), body, lang="en")
    return f"<!DOCTYPE html>\n{root}\n"


def _sections(facts: ReportFacts) -> Html:
    parts = (
        summary,
        file_section,
        damage,
        tasks,
        speeds,
        experts,
        precision,
        running,
        calibration,
        caveats,
        provenance,
    )
    return together(part(facts) for part in parts)


def _own(name: str) -> str:
    """A file of the package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _head(facts: ReportFacts, style: str, script: str) -> Html:
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src 'sha256-{_digest(style)}'",
            f"script-src 'sha256-{_digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{facts.manifest.name}: report"),
        element("style", verbatim(style)),
    )


def _digest(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _contents() -> Html:
    links = [element("li", element("a", title, href=f"#{name}")) for name, title in _CONTENTS]
    return element(
        "nav",
        element("p", "Contents", class_="over"),
        element("ol", links),
        aria_label="Contents",
    )


def _foot(facts: ReportFacts) -> Html:
    versions = facts.manifest.card_version
    built = f" of a bundle made by reap2gguf {versions}" if versions else ""
    return element("footer", f"Report by reap2gguf {__version__}{built}.")
