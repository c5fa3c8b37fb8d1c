"""A checkpoint's folder in vLLM, which needs a GPU that holds it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import DependencyError
from reap2gguf.evaluating.generation.generators import GeneratorOptions, reason_of, token_ids
from reap2gguf.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from reap2gguf.evaluating.generation.prompts import Message, Prompt

_AT_ONCE = 64  # prompts that vLLM gets together; after each such group answers are kept


class VllmGenerator:
    """Many prompts at once, on all of the GPU."""

    def __init__(self, folder: Path, options: GeneratorOptions) -> None:
        """Load it. Raises DependencyError if vLLM is not installed or does not load the model."""
        check_vllm()
        self._tokenizer = Tokenizer(folder)
        self._options = options
        try:
            import vllm

            self._parameters = vllm.SamplingParams
            self._model: Any = vllm.LLM(
                model=str(folder),
                tokenizer=str(folder),
                dtype="auto",
                trust_remote_code=False,
                max_model_len=options.context,
                seed=0,
            )
        except Exception as error:
            raise DependencyError(
                f"{folder}: vLLM does not load it ({reason_of(error)}); use "
                "--generate-with transformers, or evaluate a GGUF file"
            ) from error

    @property
    def has_template(self) -> bool:
        return self._tokenizer.has_template

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self._tokenizer.render_chat([*messages], None, add_generation_prompt)

    def complete(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        for first in range(0, len(prompts), _AT_ONCE):
            yield from self._group(prompts[first : first + _AT_ONCE])

    def _group(self, prompts: Sequence[Prompt]) -> list[str]:
        answers = [""] * len(prompts)
        asked = [
            (place, ids)
            for place, ids in enumerate(token_ids(self._tokenizer, one) for one in prompts)
            if len(ids) < self._options.context
        ]
        found = self._model.generate(
            [{"prompt_token_ids": ids} for _, ids in asked],
            [
                self._parameters(
                    temperature=0.0,
                    max_tokens=min(self._options.max_tokens, self._options.context - len(ids)),
                    stop=list(prompts[place].stops) or None,
                )
                for place, ids in asked
            ],
            use_tqdm=False,
        )
        for (place, _), output in zip(asked, found, strict=True):
            answers[place] = prompts[place].cut(str(output.outputs[0].text))
        return answers

    def close(self) -> None:
        self._tokenizer.close()
        self._model = None


def check_vllm() -> None:
    """Raise DependencyError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise DependencyError(
            "vLLM is not installed; run `pip install vllm` in an environment of its own with "
            "reap2gguf, or pass --generate-with transformers"
        )
