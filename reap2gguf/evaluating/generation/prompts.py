"""How a problem is put to a model, and where its answer ends.

As completion: the model continues the program, and ends where a new statement at the left margin
begins, as in the HumanEval paper (https://arxiv.org/abs/2107.03374) or in EvalPlus. As chat: in the
model's own template, in EvalPlus's words, with the answer begun
(https://github.com/evalplus/evalplus). As thinking: the same question, which the model answers as
it likes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:
    from reap2gguf.evaluating.generation.problems import Problem, SetName

Style = Literal["completion", "chat", "thinking"]
Message = Mapping[str, str]
STYLES: tuple[Style, ...] = get_args(Style)
# of the paper, section 2.1, and of EvalPlus for models without a chat template
_OF_PAPER = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_OF_EVALPLUS = (
    "<|endoftext|>",
    "<|endofmask|>",
    "</s>",
    "\nif __name__",
    "\ndef main(",
    "\nprint(",
)
_OF_COMPLETION: Mapping[SetName, tuple[str, ...]] = {
    "humaneval": _OF_PAPER,
    "humaneval+": (*_OF_EVALPLUS, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "),
    "mbpp+": (*_OF_EVALPLUS, '\n"""', "\nassert"),
}
FENCE = "```"
_OF_CHAT = (*_OF_EVALPLUS, f"\n{FENCE}\n")
# EvalPlus's words: another question would give other scores
_QUESTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown "
    "code block:"
)
_ANSWER = (
    "Below is a Python script with a self-contained function that solves the problem and passes "
    "corresponding tests:"
)
_PLACE = "reap2gguf: the program begins here"


class Template(Protocol):
    """A model's chat template."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """A conversation as the model reads it."""


@dataclass(frozen=True)
class Prompt:
    """What a model reads, and the texts that end its answer."""

    text: str
    stops: tuple[str, ...]
    is_rendered: bool  # by a chat template, which wrote the token for the beginning, too

    def cut(self, text: str) -> str:
        """An answer up to the first text that ends it."""
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text


def prompt_for(problem: Problem, of: SetName, style: Style, template: Template) -> Prompt:
    """What the model reads. Raises UsageError if its template refuses it."""
    if style == "completion":
        return Prompt(problem.prompt, _OF_COMPLETION[of], is_rendered=False)
    question = f"{_QUESTION}\n{FENCE}\n{problem.prompt.strip()}\n{FENCE}\n"
    asked = {"role": "user", "content": question}
    if style == "chat":
        begun = f"{_ANSWER}\n{FENCE}python\n{_PLACE}\n{FENCE}\n"
        both = [asked, {"role": "assistant", "content": begun}]
        before, place, _ = template.render(both, add_generation_prompt=False).partition(_PLACE)
        if place:
            return Prompt(before, _OF_CHAT, is_rendered=True)
        # a template that leaves the answer out: the model begins it itself
    return Prompt(template.render([asked], add_generation_prompt=True), (), is_rendered=True)
