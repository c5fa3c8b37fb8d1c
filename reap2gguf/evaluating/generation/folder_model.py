"""A checkpoint's folder in transformers, whole in the memory of one device."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UsageError
from reap2gguf.evaluating.generation.generators import GeneratorOptions, reason_of, token_ids
from reap2gguf.machine import available_bytes
from reap2gguf.messages import size
from reap2gguf.models.loading import load_whole
from reap2gguf.observing.compute.by_device import follow_devices
from reap2gguf.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from reap2gguf.evaluating.generation.prompts import Message, Prompt

_SHARE, _MORE_BYTES = 1.15, 256 * 2**20  # of the weights, for the work and the cache
_STOP_TOKENS = 24  # of the end of an answer, in which a text that ends it is looked for


class TransformersGenerator:
    """One prompt at a time, so that an answer does not depend on those beside it."""

    def __init__(self, folder: Path, options: GeneratorOptions) -> None:
        """Load the model.

        Raises UsageError if it does not fit into memory, and CheckpointError if transformers cannot
        load it.
        """
        import torch

        on_gpu = options.device == "cuda" or (
            options.device == "auto" and torch.cuda.is_available()
        )
        with Checkpoint.open(folder) as checkpoint:
            n_bytes = checkpoint.dequantized().n_bytes  # as transformers does, where it must
        check_fits(folder, n_bytes, "cuda" if on_gpu else "cpu")
        self._folder, self._options = folder, options
        self._tokenizer = Tokenizer(folder)
        self._model = _load(folder, "cuda" if on_gpu else "cpu")

    @property
    def has_template(self) -> bool:
        return self._tokenizer.has_template

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self._tokenizer.render_chat([*messages], None, add_generation_prompt)

    def complete(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        return map(self._answer, prompts)

    def _answer(self, prompt: Prompt) -> str:
        import torch

        ids = token_ids(self._tokenizer, prompt)
        room = self._options.context - len(ids)
        if not ids or room < 1:
            return ""
        given = torch.tensor([ids], device=self._model.device)
        with _quiet(), torch.inference_mode():
            found = self._model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=min(self._options.max_tokens, room),
                do_sample=False,
                stopping_criteria=[self._is_at_end(prompt, len(ids))] if prompt.stops else None,
            )
        return prompt.cut(self._tokenizer.decode(found[0, len(ids) :].tolist(), skip_special=True))

    def _is_at_end(self, prompt: Prompt, n_given: int) -> Any:
        """What transformers calls after each token."""
        import torch

        def is_at_end(ids: Any, scores: Any, **others: Any) -> Any:
            latest = ids[0, n_given:][-_STOP_TOKENS:].tolist()
            text = self._tokenizer.decode(latest, skip_special=True)
            found = any(stop in text for stop in prompt.stops)
            return torch.tensor([found], dtype=torch.bool, device=ids.device)

        return is_at_end

    def close(self) -> None:
        self._tokenizer.close()
        self._model = None
        gc.collect()


def check_fits(folder: Path, n_bytes: int, device: str) -> None:
    """Raise UsageError if a model of `n_bytes` does not fit into a device's free memory."""
    needed, free = int(n_bytes * _SHARE) + _MORE_BYTES, available_bytes()
    if device == "cuda":
        import torch

        free = torch.cuda.mem_get_info()[0]
    if needed > free:
        where = "GPU memory" if device == "cuda" else "memory"
        raise UsageError(
            f"{folder}: transformers needs {size(needed)} of {where} to answer, and {size(free)} "
            "are free; evaluate its GGUF files, which need less, leave the folder out, or use a "
            "larger machine"
        )


def _load(folder: Path, device: str) -> Any:
    from transformers import GenerationConfig

    try:
        with _quiet():
            model = load_whole(folder, dtype="auto", use_safetensors=True)
            model = model.to(device).eval()
            follow_devices(model.modules())
    except Exception as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load it ({reason_of(error)}); check the folder, or "
            "evaluate a GGUF file"
        ) from error
    # greedy, whatever the folder says of temperatures
    ends = model.generation_config.eos_token_id
    first = ends[0] if isinstance(ends, list) and ends else ends
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=first)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, and its advice on faster kernels."""
    from transformers.utils import logging

    before, was_shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if was_shown:
            logging.enable_progress_bar()
