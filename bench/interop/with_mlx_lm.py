"""Loads the safetensors folder with mlx-lm, on the CPU.

python bench/interop/with_mlx_lm.py
"""

from __future__ import annotations

from importlib.metadata import version

from oracle import Answer, Request, compare


def answer(request: Request) -> Answer:
    import mlx.core as mx
    from mlx_lm import load

    model, tokenizer = load(request.hf)
    model.set_dtype(mx.float32)  # mlx multiplies experts on the CPU in float32 alone
    greedy = []
    for prompt in request.prompts:
        ids = list(prompt)
        for _ in range(request.n_tokens):
            ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))
        greedy.append(ids[len(prompt) :])
    logits = model(mx.array([request.scored]))[0, :-1]
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    wanted = mx.array(request.scored[1:])[:, None]
    logprobs = mx.take_along_axis(scores, wanted, axis=1)[:, 0].tolist()
    texts = [tokenizer.decode(ids) for ids in greedy]
    return Answer(greedy, texts, logprobs, version("mlx-lm"))


if __name__ == "__main__":
    compare("mlx-lm", ["mlx[cpu]==0.32.4 mlx-lm==0.32.2"], answer)
