"""The folder that a GGUF file stands for: its config, and its tokenizer when that is asked for.

Other parts of the program read both from the folder of a checkpoint. This one is temporary, and is
removed with the last object that needs it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gguf import Keys

from reap2gguf.atomic import write_whole
from reap2gguf.disk.temporary import TemporaryFolder
from reap2gguf.tokenizer.from_gguf import header_tokens, write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reap2gguf.gguf_files.reader import GgufHeader

_CONFIG, _TOKENIZER, _TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_SPECIAL = {
    "bos_token": Keys.Tokenizer.BOS_ID,
    "eos_token": Keys.Tokenizer.EOS_ID,
    "pad_token": Keys.Tokenizer.PAD_ID,
    "unk_token": Keys.Tokenizer.UNK_ID,
}
ADVICE = "pass the safetensors checkpoint that it was made from, or observations of it"


class MadeFolder:
    """A folder that is there as long as this object is."""

    def __init__(self, header: GgufHeader, config: Mapping[str, Any], name: str) -> None:
        """It holds `config`, and is called `name`: errors show it."""
        self._root = TemporaryFolder()
        self.path = self._root.path / name
        self.path.mkdir()
        self._header = header
        write_whole(self.path / _CONFIG, json.dumps(config, indent=2) + "\n")

    def make_tokenizer(self) -> None:
        """Write the tokenizer and the chat template of the header, once.

        Raises UnsupportedModelError for a tokenizer that no file can be made of, ArtifactError for
        a broken header.
        """
        if (self.path / _TOKENIZER_CONFIG).exists():
            return
        write_tokenizer(self._header, self.path, ADVICE)
        metadata = self._header.metadata
        template = metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
        if isinstance(template, str):
            write_whole(self.path / _TEMPLATE, template)
        tokens = header_tokens(self._header)
        config = json.loads((self.path / _TOKENIZER_CONFIG).read_text())
        for name, key in _SPECIAL.items():
            index = metadata.get(key)
            if type(index) is int and 0 <= index < len(tokens):
                config[name] = tokens[index]
        write_whole(self.path / _TOKENIZER_CONFIG, json.dumps(config))
