"""Compares what another program computes from a bundle with what transformers computes.

Each `with_PROGRAM.py` gives `compare` the packages that the program needs and a function that
answers a request. The script then runs itself once more, inside an environment of its own, where
only the standard library, the program and this file can be imported.

Two bundles are built: the example, and a random Qwen3.5-MoE whose heads have widths that all
programs have kernels for. The request is token ids: prompts, of which the greedy continuation is
wanted, and a text, of which the log-probability of each token is wanted. A program that takes text
alone is asked with text. An argument names a folder in which the bundles are kept for other runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from environment import environment

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ("qwen3", "qwen3.5")
RECIPES = ("bf16", "unsloth-iq4km")
N_TOKENS = 24
PROMPTS = (
    "The file system",
    "def read(path):\n    return",
    "A process is",
    "import os\n",
    "In this section",
    "The options are as follows:",
)
TEXT = ROOT / "calibration" / "code.txt"
N_SCORED = 400
LIMIT = 600  # seconds for one answer


@dataclass(frozen=True)
class Request:
    """What every program is asked."""

    hf: str  # folder of the safetensors
    gguf: str  # GGUF file; empty if the program is to load the safetensors
    prompts: list[list[int]]  # token ids
    texts: list[str]  # the same prompts
    scored: list[int]  # token ids of which each but the first gets a log-probability
    n_tokens: int = N_TOKENS


@dataclass(frozen=True)
class Answer:
    """What a program computed; None where it cannot be asked for that."""

    greedy: list[list[int]] | None = None  # ids that continue each prompt
    continued: list[str] | None = None  # text that continues each prompt
    logprobs: list[float] | None = None
    version: str = ""
    notes: list[str] = field(default_factory=list)


def compare(
    program: str,
    requirements: Sequence[str],
    answer: Callable[[Request], Answer],
    files: Sequence[str] = ("",),
    bundles: Sequence[str] = BUNDLES,
) -> None:
    """Ask a program, in its own environment, and print one line of JSON per bundle and file.

    `files` are recipes whose GGUF files it loads; "" is the safetensors folder. The exit status is
    1 if any answer differs from transformers' by more than rounding.
    """
    if sys.argv[1:2] == ["--inside"]:
        request = Request(**json.loads(Path(sys.argv[2]).read_text()))
        Path(sys.argv[3]).write_text(json.dumps(asdict(answer(request))))
        return
    python = environment(program, requirements)
    with tempfile.TemporaryDirectory() as name:
        work = Path(sys.argv[1] if sys.argv[1:] else name).resolve()
        rows = [
            _ask(program, python, work, bundle, recipe) for bundle in bundles for recipe in files
        ]
    sys.exit(not all(row["agrees"] for row in rows))


def _ask(program: str, python: Path, work: Path, bundle: str, recipe: str) -> dict[str, Any]:
    built = _built(bundle, work)
    request = _request(built, recipe)
    asked, answered = work / "request.json", work / "answer.json"
    asked.write_text(json.dumps(asdict(request)))
    answered.unlink(missing_ok=True)
    command = [str(python), sys.argv[0], "--inside", str(asked), str(answered)]
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    row: dict[str, Any] = {"program": program, "bundle": bundle, "file": recipe or "safetensors"}
    try:
        ended = subprocess.run(
            command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        print(json.dumps(row | {"agrees": False, "error": f"no answer in {LIMIT} s"}), flush=True)
        return row | {"agrees": False}
    if ended.returncode or not answered.is_file():
        lines = (ended.stderr or ended.stdout).strip().splitlines()
        telling = [line for line in lines if "rror" in line] or lines or ["no output"]
        row |= {"agrees": False, "error": telling[-1].strip()[:300]}
    else:
        answer = Answer(**json.loads(answered.read_text()))
        row |= {"version": answer.version, **_compared(answer, request)}
        row |= {"notes": answer.notes} if answer.notes else {}
    print(json.dumps(row), flush=True)
    return row


def _built(bundle: str, work: Path) -> Path:
    """The output folder of a build, which is made if it is not there."""
    output = work / bundle
    if (output / bundle).is_dir():
        return output
    sys.path.insert(0, str(ROOT))
    import llama_cpp  # noqa: F401  its libggml must be loaded before that of the build

    import reap2gguf
    from tests.tiny import EXAMPLE, TinyQwen35Moe

    source = EXAMPLE
    if bundle == "qwen3.5":
        wide = TinyQwen35Moe(
            hidden=256, width=256, layers="lllflllf", n_heads=4, head_dim=64,
            key_heads=2, value_heads=4, linear_dim=128, vision_hidden=64,
        )  # fmt: skip
        source = wide.write(work / "source-qwen3.5")
        config = json.loads((source / "config.json").read_text())
        config["text_config"]["max_position_embeddings"] = (
            4096  # mistral.rs allocates more than 512
        )
        (source / "config.json").write_text(json.dumps(config))
    text = reap2gguf.CalibrationOptions(spec=str(TEXT), samples=8, max_length=256)
    reap2gguf.build(
        reap2gguf.BuildOptions(
            model=str(source), output=output, recipes=RECIPES, compression=0.25, calibration=text,
            name=bundle,
        )
    )  # fmt: skip
    return output


def _request(built: Path, recipe: str) -> Request:
    from tokenizers import Tokenizer

    hf = built / built.name
    gguf = ""
    if recipe:
        label = {"bf16": "BF16", "unsloth-iq4km": "IQ4_K_M"}[recipe]
        gguf = str(built / f"{built.name}-GGUF" / f"{built.name}-{label}.gguf")
    tokenizer = Tokenizer.from_file(str(hf / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    scored = tokenizer.encode(TEXT.read_text()[: 8 * N_SCORED]).ids[:N_SCORED]
    return Request(str(hf), gguf, prompts, list(PROMPTS), scored)


def _compared(answer: Answer, request: Request) -> dict[str, Any]:
    """How an answer differs from transformers' float32 one of the safetensors folder.

    A quantized file's answer is compared with what llama-cpp-python computes from the same file.
    llama.cpp rounds activations to 8 bits there, which other programs do not.
    """
    quantized = bool(request.gguf) and not request.gguf.endswith("-BF16.gguf")
    expected = _by_llama(request) if quantized else _by_transformers(request)
    found: dict[str, Any] = {"agrees": True}
    if answer.logprobs is not None and expected.logprobs is not None:
        far = [abs(a - b) for a, b in zip(answer.logprobs, expected.logprobs, strict=True)]
        found["logprob_difference"] = {"mean": sum(far) / len(far), "max": max(far)}
        found["agrees"] = sum(far) / len(far) < (0.1 if quantized else 0.05)
    if answer.greedy is not None:
        pairs = [
            (a, b)
            for mine, theirs in zip(answer.greedy, expected.greedy or [], strict=True)
            for a, b in zip(mine, theirs, strict=False)
        ]
        found["equal_tokens"] = f"{sum(a == b for a, b in pairs)} of {len(pairs)}"
    if answer.continued is not None:
        # shares of each text that are equal, from its first character
        starts = [
            _equal_start(a.strip(), b.strip())
            for a, b in zip(answer.continued, expected.continued or [], strict=True)
        ]
        equal = sum(start > 0.95 for start in starts)
        found["equal_texts"] = f"{equal} of {len(starts)}"
        if answer.logprobs is None:
            # rounding may turn a near tie, after which the texts part
            found["agrees"] = sum(starts) / len(starts) >= (0.5 if quantized else 0.8)
    return found


def _equal_start(one: str, other: str) -> float:
    """The share of the shorter text that equals the beginning of the longer one."""
    shorter = min(len(one), len(other))
    unequal = (i for i in range(shorter) if one[i] != other[i])
    return next(unequal, shorter) / max(1, shorter)


def _by_transformers(request: Request) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(request.hf, dtype=torch.float32).eval()
    return answer_of_model(model, AutoTokenizer.from_pretrained(request.hf), request)


def answer_of_model(model: Any, tokenizer: Any, request: Request) -> Answer:
    """What a model of transformers computes."""
    import torch

    greedy = []
    with torch.inference_mode():
        for prompt in request.prompts:
            ids = list(prompt)
            for _ in range(request.n_tokens):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            greedy.append(ids[len(prompt) :])
        scores = model(torch.tensor([request.scored])).logits[0, :-1].double().log_softmax(-1)
    wanted = torch.tensor(request.scored[1:])[:, None]
    logprobs = scores.gather(1, wanted)[:, 0].tolist()
    return Answer(greedy, [tokenizer.decode(ids) for ids in greedy], logprobs)


def _by_llama(request: Request) -> Answer:
    import numpy as np
    from llama_cpp import Llama

    model = Llama(request.gguf, n_ctx=1024, verbose=False, logits_all=True)
    model.eval(request.scored)
    scores = model.scores[: len(request.scored) - 1].astype("float64")
    scores -= scores.max(axis=1, keepdims=True)
    wanted = scores[range(len(scores)), request.scored[1:]]
    logprobs = (wanted - np.log(np.exp(scores).sum(axis=1))).tolist()
    greedy = []
    for prompt in request.prompts:
        ids = []
        for token in model.generate(prompt, top_k=1, temp=0.0, reset=True):
            ids.append(int(token))
            if len(ids) == request.n_tokens:
                break
        greedy.append(ids)
    texts = [model.detokenize(ids).decode(errors="replace") for ids in greedy]
    model.close()
    return Answer(greedy, texts, logprobs)
