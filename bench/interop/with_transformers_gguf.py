"""Loads GGUF files with transformers' `gguf_file`.

    python bench/interop/with_transformers_gguf.py

transformers ignores `expert_feed_forward_length` of a Qwen3-MoE file, so it gets the config of the
safetensors folder.
"""

from __future__ import annotations

from pathlib import Path

from oracle import Answer, Request, answer_of_model, compare


def answer(request: Request) -> Answer:
    import torch
    import transformers

    file = Path(request.gguf)
    config = transformers.AutoConfig.from_pretrained(request.hf)
    text_config = config.get_text_config()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=text_config, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(request.hf)
    found = answer_of_model(model.eval(), tokenizer, request)
    return Answer(found.greedy, found.continued, found.logprobs, transformers.__version__)


if __name__ == "__main__":
    packages = ["torch", "transformers==5.24.0 gguf==0.19.0 accelerate"]
    compare("transformers-gguf", packages, answer, files=("bf16", "unsloth-iq4km"))
