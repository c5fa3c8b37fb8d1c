"""Loads GGUF files with node-llama-cpp, a prebuilt llama.cpp for Node.js.

    python bench/interop/with_node_llama_cpp.py

Needs `node` and `npm`.
"""

from __future__ import annotations

import json
import subprocess

from environment import CACHE
from oracle import Answer, Request, compare

PACKAGE = "node-llama-cpp@3.21.1"
SCRIPT = """
import {getLlama, LlamaCompletion} from "node-llama-cpp";
import {readFileSync} from "node:fs";
const request = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: request.gguf});
const texts = [];
for (const prompt of request.prompts) {
    const context = await model.createContext({contextSize: 512});
    const completion = new LlamaCompletion({contextSequence: context.getSequence()});
    texts.push(await completion.generateCompletion(
        prompt, {maxTokens: request.n_tokens, temperature: 0}
    ));
    await context.dispose();
}
process.stdout.write(JSON.stringify(texts) + "\\n", () => process.exit(0));
"""


def answer(request: Request) -> Answer:
    folder = CACHE / "node-llama-cpp-packages"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / "node-llama-cpp").is_dir():
        subprocess.run(["npm", "install", "--silent", PACKAGE], cwd=folder, check=True)
    script = folder / "complete.mjs"
    script.write_text(SCRIPT)
    asked = {"gguf": request.gguf, "prompts": request.prompts, "n_tokens": request.n_tokens}
    ended = subprocess.run(
        ["node", str(script)], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    texts = json.loads(ended.stdout.strip().splitlines()[-1])
    return Answer(None, texts, None, PACKAGE.split("@")[1])


if __name__ == "__main__":
    compare("node-llama-cpp", [], answer, files=("bf16", "unsloth-iq4km"))
