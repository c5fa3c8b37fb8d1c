"""Commands as they are pasted, and what of them is refused."""

from __future__ import annotations

import pytest

from reap2gguf.errors import RecipeError
from reap2gguf.importing.command_line import Command, is_command, read_command

# as published with files for ik_llama.cpp
SCRIPT = r"""#!/usr/bin/env bash
model=/mnt/raid

custom="
# 48 layers; it's "attention"
blk\..*\.attn_q.*=q8_0
# experts
blk\.(0|47)\.ffn_down_exps\.weight=q6_K
"

custom=$(
  echo "$custom" | grep -v '^#' | \
  sed -Ez 's:\n+:,:g;s:,$::;s:^,::'
)

#./build/bin/llama-quantize --pure old.gguf Q8_0
numactl -N 0 -m 0 \
./build/bin/llama-quantize \
    --custom-q "$custom" \
    --imatrix "$model"/imatrix.dat \
    $model/x-BF16-00001-of-00002.gguf \
    $model/x-IQ4_XS.gguf \
    IQ4_XS \
    192 2>&1 | tee log.txt
""".replace(' "attention"', "")


def read(text: str) -> Command:
    return read_command(text, "here")


def test_a_shell_script() -> None:
    command = read(SCRIPT)
    ((option, value),) = command.options
    assert option == "--custom-q"
    assert r"blk\.(0|47)\.ffn_down_exps\.weight=q6_K" in value.splitlines()
    assert command.words == [
        "/mnt/raid/x-BF16-00001-of-00002.gguf", "/mnt/raid/x-IQ4_XS.gguf", "IQ4_XS", "192",
    ]  # fmt: skip
    assert not command.is_pure
    assert len(command.notes) == 1


def test_options_with_and_without_values() -> None:
    command = read(
        "./llama-quantize --allow-requantize --leave-output-tensor --pure --imatrix i.gguf "
        "--tensor-type attn_v=q8_0 --tensor-type 'blk\\.(0|1)\\.ffn=q6_K' "
        '--token-embedding-type q8_0 --output-tensor-type "q6_K" --override-kv a=int:1 m.gguf Q4_K'
    )
    assert command.options == [
        ("--tensor-type", "attn_v=q8_0"),
        ("--tensor-type", r"blk\.(0|1)\.ffn=q6_K"),
        ("--token-embedding-type", "q8_0"),
        ("--output-tensor-type", "q6_K"),
    ]
    assert command.is_pure
    assert command.leaves_output
    assert command.words == ["m.gguf", "Q4_K"]
    assert [note.split()[0] for note in command.notes] == [
        "--allow-requantize", "--imatrix", "--override-kv",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "--tensor-type attn_v=q8_0 Q4_K_M",
        "--tensor-type attn_v=q8_0\n  Q4_K_M",
        "--tensor-type attn_v=q8_0 \\\n  Q4_K_M",
        "--tensor-type attn_v=q8_0 \\\r\n  Q4_K_M",
        "KIND=Q4_K_M\nllama-quantize --tensor-type attn_v=q8_0 ${KIND} > log",
        "RULE='attn_v=q8_0'\nsudo nice llama-quantize --tensor-type \"$RULE\" Q4_K_M && ls",
        "OMP=1 llama-quantize.exe --tensor-type attn_v=q8_0 Q4_K_M",
        r"C:\x\llama-quantize.exe --tensor-type attn_v=q8_0 Q4_K_M".replace("\\", "/"),
    ],
)
def test_the_same_in_other_words(text: str) -> None:
    assert is_command(text)
    command = read(text)
    assert command.options == [("--tensor-type", "attn_v=q8_0")]
    assert command.words == ["Q4_K_M"]


@pytest.mark.parametrize(
    "text", ["attn_v=q8_0", "^a$=q8_0,b=q4_K", "# --command used: llama-quantize\nattn_v=q8_0"]
)
def test_a_list_is_no_command(text: str) -> None:
    assert not is_command(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama-quantize --tensor-type", "here: --tensor-type without a value"),
        ("llama-quantize --tensor-types a=q8_0", "'--tensor-types' is not an option of llama-q"),
        ("llama-quantize --attn-q-type q8_0 m Q4_0", "--attn-q-type is not supported, as no recip"),
        ("llama-quantize 'a", "not a command that a shell would read \\(No closing quotation\\)"),
        ("llama-quantize a Q4_0\nllama-quantize b Q8_0", "2 llama-quantize commands, expected one"),
        ('llama-quantize --custom-q "$x" a Q4_0', r"--custom-q \$x: the variable is not set in"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(text)
