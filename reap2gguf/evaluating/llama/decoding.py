"""llama.cpp's own functions, called by the process that `worker.py` is.

Nothing here may load the package's own libggml: llama_cpp contains one of the same name and fails
if the other was loaded first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from reap2gguf.evaluating.llama.batches import Floats, Part

_CONTEXT_STEP = 256  # tokens; llama.cpp rounds up to it
_LONGEST_PIECE = 4096  # bytes of a token


class LlamaCppError(Exception):
    """llama.cpp reports that it cannot do something."""


class LoadedModel:
    """A file in memory, and its vocabulary."""

    def __init__(self, library: ModuleType, path: str, threads: int, gpu_layers: int) -> None:
        """Load a file. Raises LlamaCppError if llama.cpp refuses it."""
        self.library, self.threads = library, threads
        library.llama_backend_init()
        params = library.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self.pointer = library.llama_model_load_from_file(path.encode(), params)
        if not self.pointer:
            raise LlamaCppError("it does not load")
        self.vocab = library.llama_model_get_vocab(self.pointer)
        self.n_tokens = int(library.llama_vocab_n_tokens(self.vocab))
        self.context_length = int(library.llama_model_n_ctx_train(self.pointer))
        self.on_gpu = bool(gpu_layers and library.llama_supports_gpu_offload())

    def close(self) -> None:
        self.library.llama_model_free(self.pointer)

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are recognised, and none is added."""
        data = text.encode("utf-8", "surrogatepass")
        most = len(data) + 8
        found = (self.library.llama_token * most)()
        count = self.library.llama_tokenize(self.vocab, data, len(data), found, most, False, True)
        if count < 0:
            raise LlamaCppError("it cannot tokenize the prompt")
        return list(found[:count])

    def decode_text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        buffer = ctypes.create_string_buffer(_LONGEST_PIECE)
        data = b""
        for token in tokens:
            count = self.library.llama_token_to_piece(
                self.vocab, token, buffer, _LONGEST_PIECE, 0, True
            )
            if count < 0:
                raise LlamaCppError(f"token {token} has a text of {-count:,} bytes")
            data += buffer.raw[:count]
        return data.decode("utf-8", "replace")

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(self.library.llama_vocab_is_eog(self.vocab, token))


class Context:
    """Memory for some sequences of tokens, and the logits of the last call. A context manager."""

    def __init__(
        self, model: LoadedModel, n_rows: int, length: int, n_batch: int, n_ubatch: int
    ) -> None:
        """For `n_rows` sequences of `length` tokens each, of which a call reads `n_batch`.

        Raises LlamaCppError if llama.cpp cannot make it.
        """
        self._model, self._library = model, model.library
        params = self._library.llama_context_default_params()
        params.n_ctx = n_rows * (-(-length // _CONTEXT_STEP) * _CONTEXT_STEP)
        params.n_seq_max = n_rows
        params.n_batch = n_batch
        params.n_ubatch = min(n_ubatch, n_batch)
        params.n_threads = params.n_threads_batch = model.threads
        params.no_perf = True
        self._context = self._library.llama_init_from_model(model.pointer, params)
        if not self._context:
            raise LlamaCppError(
                f"it cannot make a context of {n_rows:,} x {length:,} tokens, as where memory is "
                "too small"
            )
        self._batch = self._library.llama_batch_init(n_batch, 0, 1)
        self._fields = {
            name: np.ctypeslib.as_array(getattr(self._batch, name), (n_batch,))
            for name in ("token", "pos", "n_seq_id", "logits")
        }

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)

    def clear(self) -> None:
        """Forget all tokens."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def read(self, parts: Sequence[Part], tokens: Sequence[Any]) -> None:
        """Read parts of rows, each a sequence of its own, with the tokens (n,) of each part.

        Raises LlamaCppError if llama.cpp cannot.
        """
        fields, at = self._fields, 0
        for number, (part, own) in enumerate(zip(parts, tokens, strict=True)):
            span = slice(at, at + len(own))
            positions = np.arange(part.start, part.stop)
            fields["token"][span] = own
            fields["pos"][span] = positions
            fields["n_seq_id"][span] = 1
            fields["logits"][span] = (positions >= part.first) & (positions < part.last)
            for place in range(at, at + len(own)):
                self._batch.seq_id[place][0] = number
            at += len(own)
        self._batch.n_tokens = at
        if status := self._library.llama_decode(self._context, self._batch):
            raise LlamaCppError(f"it cannot compute a batch of {at:,} tokens (status {status})")

    def wait(self) -> None:
        """Wait until all is computed: a GPU computes beside this process."""
        self._library.llama_synchronize(self._context)

    def logits(self, count: int) -> Floats:
        """All of the last call, (count, V), as they lie in llama.cpp's memory until the next."""
        pointer = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (count, self._model.n_tokens))
