"""Loads GGUF files with mistral.rs, with the tokenizer and the template of the file itself.

python bench/interop/with_mistral_rs.py
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from oracle import Answer, Request, compare


def answer(request: Request) -> Answer:
    from mistralrs import CompletionRequest, Runner, Which

    file = Path(request.gguf)
    runner = Runner(which=Which.GGUF(str(file.parent), file.name), max_seqs=1)
    texts = []
    for prompt in request.texts:
        asked = CompletionRequest(
            model="default", prompt=prompt, max_tokens=request.n_tokens, temperature=0.0, top_k=1
        )
        texts.append(runner.send_completion_request(asked).choices[0].text)
    return Answer(None, texts, None, version("mistralrs"))


if __name__ == "__main__":
    compare("mistral.rs", ["mistralrs==0.9.5"], answer, files=("bf16", "unsloth-iq4km"))
