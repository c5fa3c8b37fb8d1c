from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel

from reap2gguf.tokenizer.byte_symbols import byte_symbols


def test_bytes_have_256_symbols() -> None:
    assert len(set(byte_symbols())) == 256
    assert not any(symbol.isspace() for symbol in byte_symbols())


def test_they_are_those_of_the_tokenizers_library() -> None:
    assert set(byte_symbols()) == set(ByteLevel.alphabet())
    splitter = ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(map(chr, range(0x80))) + "é中🦙"
    [(found, _)] = splitter.pre_tokenize_str(text)
    assert found == "".join(byte_symbols()[byte] for byte in text.encode())
