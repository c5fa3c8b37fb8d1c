"""Broken tokenizers, recipes and calibration texts."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from tests.hostile.room import PLAN, Build, Case, Room, change_json, sparse

Values = dict[str, Any]
OBSERVE = ("--device", "cpu", "-o", "seen.out")


def tokenizer(change: Callable[[Values], Any], name: str = "tokenizer.json") -> Build:
    """`plan` of a model whose tokenizer is edited."""

    def build(room: Room) -> list[Any]:
        model = room.copy("qwen3")
        change_json(model / name, change)
        return ["plan", model, *PLAN]

    return build


def settings(**values: Any) -> Build:
    return tokenizer(lambda found: found.update(values), "tokenizer_config.json")


def vocab(token: str, number: Any) -> Build:
    return tokenizer(lambda found: found["model"]["vocab"].update({token: number}))


def of_model(**values: Any) -> Build:
    return tokenizer(lambda found: found["model"].update(values))


def top(**values: Any) -> Build:
    return tokenizer(lambda found: found.update(values))


def added(**values: Any) -> Build:
    return tokenizer(lambda found: found["added_tokens"][0].update(values))


def raw(name: str, content: bytes) -> Build:
    def build(room: Room) -> list[Any]:
        model = room.copy("qwen3")
        (model / name).write_bytes(content)
        return ["plan", model, *PLAN]

    return build


def observed(build: Build) -> Build:
    """The same model given to `observe`, which loads the tokenizer that transformers has."""

    def instead(room: Room) -> list[Any]:
        model = build(room)[1]
        text = room.write("text.txt", "word " * 4000)
        return ["observe", model, "--calibration", text, "--max-length", "64", *OBSERVE]

    return instead


def splits(*patterns: Any) -> Build:
    steps = [{"type": "Split", "pattern": {"Regex": pattern}} for pattern in patterns]
    return top(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})


def second_split(values: Values) -> None:
    """One pattern that is known, and one that takes exponential time."""
    steps = values["pre_tokenizer"]["pretokenizers"]
    steps.append({"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"})


MISSING = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "z", "type_id": 0}}],
           "pair": [], "special_tokens": {}}  # fmt: skip


def padding(length: int) -> Values:
    return {"strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": 0,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip


REPLACE = {"type": "Replace", "pattern": {"Regex": ""}, "content": "xx"}
TOKENIZERS = [
    *[Case(f"tokenizer id {n!r}", vocab("zz", n), "has the id") for n in (
        -1, 4096, 2**31, 2**70, 1.5, True, "5", None, [])],
    *[Case(f"added id {n!r}", added(id=n), "has the id") for n in (-1, 2**40, True, 0.5, None)],
    Case("added token without id", tokenizer(lambda f: f["added_tokens"][0].pop("id") and None),
         "added_tokens are not"),
    Case("added token a number", added(content=5), "added_tokens are not"),
    Case("added tokens a text", top(added_tokens="abc"), "added_tokens are not"),
    Case("token of a newline", vocab("a\nb\x1b[2J", -1), "'a\\nb\\x1b[2J'"),
    Case("token half a character", vocab("\ud800", 4000), "half a character"),
    Case("token of ten megabytes", vocab("n" * 10**7, -1), "has the id"),
    Case("vocabulary empty", of_model(vocab={}), "no vocabulary"),
    Case("vocabulary a list", of_model(vocab=[["a", 1]]), "no vocabulary"),
    Case("tokenizer model Unigram", of_model(type="Unigram"), "tokenizer model 'Unigram'"),
    Case("tokenizer model a list", of_model(type=["BPE"]), "tokenizer model ['BPE']"),
    Case("tokenizer model gone", top(model=None), "tokenizer model None"),
    *[Case(f"merges {json.dumps(m)}", of_model(merges=m), "merges") for m in (
        None, 5, "a b", {}, [], ["ab"], ["a b c"], [["a"]], [["a", 5]], [5], [None],
        ["a b", ["a", "b"]])],
    Case("splits unknown", splits("\\w+"), "splits text by"),
    Case("splits of a list", splits([1]), "splits text by"),
    Case("splits twice", tokenizer(second_split), "splits text by"),
    Case("pre-tokenizer a number", top(pre_tokenizer=5), "no pattern"),
    Case("pre-tokenizers a number", top(pre_tokenizer={"pretokenizers": 5}), "no pattern"),
    Case("pre-tokenizer none", top(pre_tokenizer=None), "no pattern"),
    Case("normalizer that panics", top(normalizer=REPLACE), "normalizer"),
    Case("normalizer precompiled", top(normalizer={"type": "Precompiled"}), "normalizer"),
    Case("normalizer a list", top(normalizer=[1]), "normalizer is [1]"),
    Case("prefix that panics", of_model(continuing_subword_prefix="ééé"), "continuing_subword"),
    Case("dropout", of_model(dropout=0.5), "dropout is 0.5"),
    Case("post-processor a list", top(post_processor=[1]), "post_processor is"),
    Case("post-processor of text", top(post_processor={"processors": "ab"}), "processor is"),
    Case("template pieces numbers", top(post_processor={
        "type": "TemplateProcessing", "single": [1, 2]}), "post_processor.single is [1, 2]"),
    Case("chat template a number", settings(chat_template=5), "chat_template is 5"),
    Case("chat template of numbers", settings(chat_template=[1]), "chat_template is [1]"),
    Case("chat template unnamed", settings(chat_template=[{"template": "a"}]), "chat_template"),
    Case("chat template no text", settings(chat_template=[{"name": "a", "template": 5}]), "chat_t"),
    Case("settings a list", raw("tokenizer_config.json", b"[]"), "holds a list"),
    Case("settings not JSON", raw("tokenizer_config.json", b"{"), "not valid JSON"),
    Case("special map not JSON", raw("special_tokens_map.json", b"\0"), "not valid JSON"),
    Case("added map a list", raw("added_tokens.json", b"[]"), "holds a list"),
    Case("generation config broken", raw("generation_config.json", b"{'a': 1}"), "not valid JSON"),
    Case("generation config deep", raw("generation_config.json", b"[" * 10**5), "not valid JSON"),
    Case("chat template not UTF-8", raw("chat_template.jinja", b"\xff"), "not UTF-8"),
    Case("chat template JSON broken", raw("chat_template.json", b"[]"), "holds a list"),
    Case("tokenizer empty", raw("tokenizer.json", b""), "not valid JSON"),
    Case("tokenizer not UTF-8", raw("tokenizer.json", b'{"\xff": 1}'), "not UTF-8"),
    Case("tokenizer of lists", raw("tokenizer.json", b'{"a": [' + b"[]," * 10**7 + b"1]}"), "most"),
    Case("tokenizer huge", sparse("qwen3", "tokenizer.json", 2**38), "expected at most"),
    Case("tokenizer model huge", sparse("qwen3", "chat_template.jinja", 2**38), "at most"),
    # what only the libraries know
    *[Case(f"padding {n}", observed(top(padding=padding(n), truncation="x")), "no usable")
      for n in (0, 10**12, 2**63)],
    Case("decoder unknown", tokenizer(lambda f: f.update(decoder={"type": "x"})), "decoder is 'x'"),
    Case("post-processor that panics", observed(top(post_processor=MISSING)), "or.single is"),
    Case("tokenizer class a number", observed(settings(tokenizer_class=5)), "no usable tokenizer"),
    Case("token of unknown merges", observed(of_model(merges=["nope nada"])), "'nope' is not"),
    Case("observe, id beyond", observed(vocab("zz", 2**40)), "has the id"),
    Case("observe, normalizer", observed(top(normalizer=REPLACE)), "normalizer"),
]  # fmt: skip

HEAD = 'title = "t"\nlabel = "L"\nfile_type = "Q4_K_M"\n'


def recipe(content: bytes | str, command: str = "check") -> Build:
    return lambda room: [
        "recipes", command, room.write("r.toml", content),
        *([room.copy("qwen3")] if command == "check" else []),
    ]  # fmt: skip


def rule(match: str, kind: str = "Q8_0", more: str = "") -> str:
    return f'[[rules]]\nmatch = {json.dumps(match)}\ntype = "{kind}"\n{more}'


def regex(pattern: str) -> str:
    return rule(pattern).replace("match =", "regex =")


MANY = "".join(rule(f"blk.*.attn_{n}*") for n in range(999))
PATHOLOGICAL = "*a" * 60 + "*b"
RECIPES = [
    Case("recipe empty", recipe(""), "is empty, expected a recipe"),
    Case("recipe not UTF-8", recipe(b"\xff\xfe"), "cannot be read"),
    Case("recipe of NUL", recipe(bytes(100)), "not valid TOML"),
    Case("recipe deep lists", recipe("\n".join(["a = ["] + ["["] * 5000)), "not valid TOML"),
    Case("recipe deep on a line", recipe("a = " + "[" * 10**5), "not valid TOML"),
    Case("recipe dotted keys", recipe(".".join("a" * 10**5) + " = 1"), "of over 16 parts"),
    Case("recipe dotted tables", recipe("[" + ".".join("a" * 290) + "]\n"), "of over 16 parts"),
    Case("recipe many dotted", recipe("\n".join(
        f"k{n}." + ".".join("a" * 290) + " = 1" for n in range(430))), "of over 16 parts"),
    Case("recipe inline tables", recipe("a = " + "{a=" * 140 + "1" + "}" * 140), "unknown key 'a'"),
    Case("recipe huge", lambda room: ["recipes", "check", room.sparse("r.toml", 2**38)], "over"),
    Case("recipe of 590 digits", recipe(HEAD.replace('"t"', "9" * 590)), "title is 999"),
    Case("recipe key unknown", recipe(HEAD + "tile = 1\n"), "unknown key 'tile'"),
    Case("recipe key of a newline", recipe(HEAD + '"a\\nb\\u001b[2J" = 1\n'), "'a\\nb\\x1b[2J'"),
    Case("recipe key twice", recipe(HEAD + HEAD), "not valid TOML"),
    Case("recipe rules a number", recipe(HEAD + "rules = 5\n"), "rules must be"),
    Case("recipe rules of numbers", recipe(HEAD + "rules = [1]\n"), "expected a [[rules]] table"),
    Case("recipe rules too many", recipe(HEAD + "[[rules]]\n" * 1001), "at most 1000"),
    Case("recipe rules many", recipe(HEAD + MANY), "rule 'blk.*.attn_"),
    Case("recipe label a path", recipe(HEAD.replace('"L"', '"../L"')), "label '../L'"),
    Case("recipe label a number", recipe(HEAD.replace('"L"', "5")), "label is 5"),
    Case("recipe label long", recipe(HEAD.replace('"L"', f'"{"L" * 500}"')), "label 'LLL"),
    Case("recipe title a date", recipe(HEAD.replace('"t"', "1979-05-27")), "title is"),
    Case("recipe file type", recipe(HEAD.replace("Q4_K_M", "Q4_K_X\\u001b")), "Q4_K_X\\x1b"),
    Case("recipe type unknown", recipe(HEAD + rule("*", "Q9")), "type 'Q9'"),
    Case("recipe type a list", recipe(HEAD + '[[rules]]\nmatch = "*"\ntype = [1]\n'), "type is"),
    Case("recipe match gone", recipe(HEAD + '[[rules]]\ntype = "Q8_0"\n'), "missing key `match`"),
    Case("recipe match long", recipe(HEAD + rule("a" * 300)), "is not a glob"),
    Case("recipe match a newline", recipe(HEAD + rule("a\nb")), "match 'a\\nb'"),
    Case("recipe match pathological", recipe(HEAD + rule(PATHOLOGICAL)), "expected at most 16"),
    Case("recipe match of brackets", recipe(HEAD + rule("[" * 99)), "matches no tensor"),
    Case("recipe match a range", recipe(HEAD + rule("[z-a]*")), "matches no tensor"),
    Case("recipe regex pathological", recipe(HEAD + regex("(a+)+(a*)*$!")), "matches no tensor"),
    Case("recipe regex of groups", recipe(HEAD + regex("(" * 400)), "groups within each other"),
    Case("recipe regex of repeats", recipe(HEAD + regex("((a{99}){99}){99}")), "write it shorter"),
    Case("recipe regex long", recipe(HEAD + regex("a" * 10**5)), "expected at most 1,500"),
    Case("import empty", recipe("", "import"), "has no rule"),
    Case("import not UTF-8", recipe(b"a=q8_0\xff", "import"), "cannot be read"),
    Case("import huge", lambda room: ["recipes", "import", room.sparse("r", 2**38)], "over"),
    Case("import many rules", recipe("a=q8_0\n" * 30_000, "import"), "over 1,000 rules"),
    Case("import of quotes", recipe("--pure " + "'" * 99_999, "import"), "a shell would read"),
    Case("import of sets", recipe('A="\n' * 50_000 + "--pure", "import"), "names no file type"),
    Case("recipe optional a text", recipe(HEAD + rule("*", more='optional = "a"\n')), "optional"),
    Case("recipe a folder", lambda room: ["recipes", "show", room.copy("qwen3")], "no recipe"),
    Case("recipe no file", lambda room: ["recipes", "show", "a\nb.toml"], "no such recipe file"),
    Case("recipe to show", recipe(HEAD + "[", "show"), "not valid TOML"),
]  # fmt: skip


def corpus(name: str, content: bytes | str) -> Build:
    return lambda room: [
        "plan", room.copy("qwen3"), *PLAN, "--calibration", room.write(name, content),
    ]  # fmt: skip


def lines(content: bytes | str) -> Build:
    return corpus("c.jsonl", content)


def parquet(content: bytes) -> Build:
    """`observe` on Parquet, which is read when the tokenizer is there."""
    return lambda room: [
        "observe", room.copy("qwen3"), "--calibration", room.write("c.parquet", content), *OBSERVE,
    ]  # fmt: skip


def of_folder(room: Room) -> list[Any]:
    folder = room.folder / "texts"
    folder.mkdir()
    (folder / "a.txt").mkdir()
    return ["plan", room.copy("qwen3"), *PLAN, "--calibration", folder]


def nothing_in_folder(room: Room) -> list[Any]:
    folder = room.folder / "texts"
    folder.mkdir()
    return ["plan", room.copy("qwen3"), *PLAN, "--calibration", folder]


def imatrix_text(content: bytes) -> Build:
    return lambda room: [
        "plan", room.copy("qwen3"), *PLAN, "--imatrix-text", room.write("i.txt", content),
    ]  # fmt: skip


COMPOSITES = [
    ("of nothing", "a/b:1,,c/d:2", "component 2 of 3: '', expected name[subset](split):n"),
    ("of no rows", "a/b:0", "'0' rows of 'a/b'"),
    ("of digits", "a/b:" + "9" * 5000, "expected from 1 to"),
    ("of newlines", "a/b:1,c\n\x1b[2Jd:2", "c\\n\\x1b[2Jd"),
    ("of thousands", "a/b:1," * 5000 + "a/b:1", "5,001 components, expected at most 256"),
    ("of NUL", "a/b:1,a\0b:2", "a\\x00b: no such file or folder"),
    ("of a pipe's name", "a/b:1,|cat:2", "|cat: no such file or folder"),
]
FOOTER = b"PAR1" + b"\xff" * 64 + struct.pack("<I", 2**31 - 1) + b"PAR1"
CALIBRATIONS = [
    Case("text not UTF-8", corpus("c.txt", b"abc\xff\xfe"), "not UTF-8"),
    Case("text UTF-16", corpus("c.txt", "abc".encode("utf-16")), "UTF-16 text"),
    Case("text cut in a letter", corpus("c.txt", "aé".encode()[:-1]), "not UTF-8"),
    Case("text half a character", corpus("c.txt", b"\xed\xa0\x80"), "not UTF-8"),
    Case("text huge", lambda room: [
        "plan", room.copy("qwen3"), *PLAN, "--calibration", room.sparse("c.txt", 2**40)],
        "at most"),
    Case("text long and broken", lambda room: [
        "plan", room.copy("qwen3"), *PLAN, "--calibration",
        room.write("c.txt", b"a" * 2**26 + b"\xff")], "not UTF-8"),
    Case("text a pickle", corpus("c.txt", b"\x80\x04\x95"), "not UTF-8"),
    Case("text of another kind", corpus("c.doc", b"abc"), "expected a .txt"),
    Case("text not there", lambda room: [
        "plan", room.copy("qwen3"), *PLAN, "--calibration", "a\nb.txt"], "a\\nb.txt: no such file"),
    *[Case(f"composite {shape}", lambda room, spec=spec: [
        "plan", room.copy("qwen3"), *PLAN, "--calibration", spec], message)
      for shape, spec, message in COMPOSITES],
    Case("imatrix text not UTF-8", imatrix_text(b"\xff"), "not UTF-8"),
    Case("imatrix text a folder", lambda room: [
        "plan", room.copy("qwen3"), *PLAN, "--imatrix-text", room.folder], "is a directory"),
    Case("lines not JSON", lines('{"text": "a"}\n{"text"'), "line 2 is not JSON"),
    Case("lines not UTF-8", lines(b'{"text": "\xff"}'), "line 1 is not JSON"),
    Case("lines UTF-16", lines('{"text": "a"}'.encode("utf-16")), "UTF-16 text"),
    Case("lines of NUL", lines(bytes(1000)), "is not JSON"),
    Case("lines deep", lines("[" * 10**6), "is not JSON"),
    Case("lines of digits", lines("9" * 10**6), "is not JSON"),
    Case("lines of lists", lines("[1]\n"), "a int, expected an object"),
    Case("lines of nothing", lines('{"a": null}\n'), "has a, expected text"),
    Case("lines of many names", lines(json.dumps({f"n{i}": 1 for i in range(10**5)})), "has n0"),
    Case("lines of empty objects", lines("{}\n"), "has no fields"),
    Case("lines, text a number", lines('{"text": 5}\n'), "text is 5, expected text"),
    Case("lines half a character", lines('{"text": "a\\ud800"}\n'), "half a character"),
    Case("lines messages a number", lines('{"messages": 5}\n'), "expected messages"),
    Case("lines messages empty", lines('{"messages": []}\n'), "expected messages"),
    Case("lines message no role", lines('{"messages": [{"content": "a"}]}\n'), "expected messages"),
    Case("lines role a list", lines('{"messages": [{"role": [], "content": ""}]}\n'), "expected"),
    Case("lines prompt a number", lines('{"prompt": 5, "completion": "a"}\n'), "expected text"),
    Case("lines one of 5 MB", lines('{"text": "' + "a" * 5 * 10**6 + '"}'), "too long"),
    Case("lines huge", lambda room: [
        "plan", room.copy("qwen3"), *PLAN, "--calibration", room.sparse("c.jsonl", 2**40)],
        "too long"),
    Case("folder of folders", of_folder, "a folder, expected a file"),
    Case("folder of nothing", nothing_in_folder, "holds no text"),
    Case("parquet empty", parquet(b""), "Parquet"),
    Case("parquet of text", parquet(b"this is no Parquet file at all"), "Parquet"),
    Case("parquet cut", parquet(b"PAR1" + bytes(100)), "Parquet"),
    Case("parquet footer", parquet(FOOTER), "Parquet"),
]  # fmt: skip
