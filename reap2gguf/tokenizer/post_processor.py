"""What a `tokenizer.json` puts before a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reap2gguf.tokenizer.settings import BYTE_LEVEL_AFTER, check_settings, unknown
from reap2gguf.tokenizer.steps import is_sequence, steps_of


def added_by_post_processor(
    tokenizer: dict[str, Any], where: Path, prefix: Sequence[str] = ()
) -> list[int]:
    """The ids that the post-processor puts before each text: none, one, or those of `prefix`.

    Raises UnsupportedModelError for a post-processor that does anything else.
    """
    part = tokenizer.get("post_processor")
    first: list[int] = []
    for index, step in enumerate(steps_of(part, "processors")):
        name = f"post_processor.processors[{index}]" if is_sequence(part) else "post_processor"
        if step.get("type") == "ByteLevel":
            check_settings(step, BYTE_LEVEL_AFTER, "ByteLevel", where, name)
        else:
            first += _template_prefix(step, where, name)
    ids = {token.get("content"): token.get("id") for token in tokenizer.get("added_tokens") or []}
    if len(first) > 1 and first != [ids.get(text) for text in prefix]:
        raise unknown(where, "post_processor", part, "at most one token before a text")
    return first


def has_step(tokenizer: dict[str, Any], kind: str) -> bool:
    """Whether the post-processor has a step of a kind, such as TemplateProcessing."""
    steps = steps_of(tokenizer.get("post_processor"), "processors")
    return any(step.get("type") == kind for step in steps)


def _template_prefix(step: dict[str, Any], where: Path, name: str) -> list[int]:
    """The ids before the text in a TemplateProcessing step."""
    template = step.get("single") if step.get("type") == "TemplateProcessing" else None
    if not isinstance(template, list) or not template:
        expected = "ByteLevel, or a template of at most one special token and the text"
        raise unknown(where, name, step, expected)
    *before, text = template
    if not isinstance(text, dict) or _inner(text, "Sequence").get("id") != "A":
        raise unknown(where, f"{name}.single", template, "a template that ends with the text")
    ids: list[int] = []
    for item in before:
        token = _inner(item, "SpecialToken").get("id")
        known = _inner(_inner(step, "special_tokens"), token).get("ids")
        if not (isinstance(known, list) and len(known) == 1 and type(known[0]) is int):
            raise unknown(where, f"{name}.single", template, "special tokens of one id each")
        ids += known
    return ids


def _inner(part: Any, key: Any) -> dict[str, Any]:
    """The object that an object has under `key`, or an empty one."""
    inner = part.get(key) if isinstance(part, dict) and isinstance(key, str) else None
    return inner if isinstance(inner, dict) else {}
