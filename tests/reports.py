"""Facts for a report without a build, and a reader of the pages made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import numpy as np

from reap2gguf.artifacts.observations import LayerObservation, Observations
from reap2gguf.bundle.evaluation import Evaluation
from reap2gguf.bundle.manifest import (
    CalibrationRecord,
    ComponentRecord,
    CoverageRecord,
    FileRecord,
    FolderRecord,
    GgufRecord,
    Manifest,
    PruningRecord,
    SourceRecord,
)
from reap2gguf.bundle.options_record import OptionsRecord
from reap2gguf.reporting.facts import ReportFacts, TensorSize
from tests.evaluations import EXAMPLE, Q4, Q8

_VOID = {"br", "col", "hr", "input", "meta"}


def gguf_record(file: str, label: str, n_layers: int, n_bytes: int, bits: float) -> GgufRecord:
    """A file whose down projections have another type in every third layer."""
    main, more = ("Q8_0", "Q8_0") if label == "Q8_0" else ("Q4_K", "Q6_K")
    tensors = {"token_embd.weight": more, "output_norm.weight": "F32"}
    for layer in range(n_layers):
        tensors[f"blk.{layer}.attn_q.weight"] = main
        tensors[f"blk.{layer}.ffn_gate_inp.weight"] = "F32"
        tensors[f"blk.{layer}.ffn_up_exps.weight"] = main
        tensors[f"blk.{layer}.ffn_down_exps.weight"] = main if layer % 3 else more
    return GgufRecord(
        file, label.lower(), f"{label} mixture", label, label, "label = 1", n_bytes, bits, tensors
    )


def observations_of(n_layers: int, n_experts: int) -> Observations:
    """Observations in which every layer has an expert that was never seen."""
    random = np.random.default_rng(7)
    layers = {}
    for layer in range(n_layers):
        count = random.integers(1, 5000, n_experts)
        count[layer % n_experts] = 0
        sums = count * random.lognormal(0, 1, n_experts)
        layers[layer] = LayerObservation(count, sums, sums / 3, sums * 2, sums)
    return Observations(layers, "ab" * 32, "default", "cd" * 32, 58, 76_708, 0)


def facts_of(
    n_layers: int = 4,
    n_experts: int = 16,
    n_kept: int = 12,
    evaluation: Evaluation | None = EXAMPLE,
) -> ReportFacts:
    """A pruned bundle with two files, everything beside it."""
    seen = observations_of(n_layers, n_experts)
    kept = {}
    for layer, one in seen.layers.items():
        order = np.argsort(-one.reap_sum / np.maximum(one.count, 1), kind="stable")
        kept[layer] = tuple(sorted(order[:n_kept].tolist()))
    files = (
        gguf_record(Q8, "Q8_0", n_layers, 12_200_000, 8.6),
        gguf_record(Q4, "Q4_K_M", n_layers, 7_300_000, 5.1),
    )
    component = ComponentRecord("owner/texts", None, "train", "0123456789abcdef", 58, 76_708, 25)
    manifest = Manifest(
        name="tiny",
        program={"reap2gguf": "0.1.0", "torch": "2.13.0"},
        source=SourceRecord(
            "owner/model", "89abcdef01234567", "ef" * 32, "Qwen3Moe", 14_437_120, 28_874_240
        ),
        pruning=PruningRecord(
            "reap", n_experts, n_kept, 4, kept, "12" * 32, 58, 76_708, 0,
            coverage=CoverageRecord(0, 2400, n_layers, 0, n_layers, 0, 100),
        ),
        calibration=CalibrationRecord(
            "default", "34" * 32, 2048, 42, False, "default", "56" * 32, 149, 512, (component,), 149
        ),
        hf=FolderRecord(
            "tiny", 1, 11_287_296, 22_574_592,
            {"model.safetensors": FileRecord(22_595_512, "78" * 32)},
        ),
        gguf=files,
        verification={"summary": "3 checks passed", "passed": ["safetensors: equal"]},
        caveats=("texts differ in form NFC",),
        options=OptionsRecord(
            n_kept, None, None, "reap", "prune", "default", 1024, 2048, 42, False, None, None, None,
            512, None, "cpu", "float32",
        ),
        evaluation=evaluation,
    )  # fmt: skip
    sizes = {one.file: {name: TensorSize(1000, 700) for name in one.tensors} for one in files}
    after = {layer: np.arange(n_kept) + layer for layer in range(n_layers)}
    return ReportFacts(manifest, seen, after, sizes, {Q4: "9a" * 32, Q8: "bc" * 32})


def without_evaluation(facts: ReportFacts) -> ReportFacts:
    return replace(facts, manifest=replace(facts.manifest, evaluation=None))


@dataclass
class Node:
    """An element of a page."""

    name: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    def all(self, name: str = "", class_: str = "") -> Iterator[Node]:
        """Elements below, in the order of the page, of a name and of a class."""
        for child in self.children:
            if isinstance(child, str):
                continue
            classes = (child.attributes.get("class") or "").split()
            if (not name or child.name == name) and (not class_ or class_ in classes):
                yield child
            yield from child.all(name, class_)

    def one(self, name: str = "", class_: str = "", id: str = "") -> Node:
        """The only such element."""
        found = [n for n in self.all(name, class_) if not id or n.attributes.get("id") == id]
        assert len(found) == 1, f"{len(found)} elements {name} {class_} {id}"
        return found[0]

    @property
    def text(self) -> str:
        return "".join(one if isinstance(one, str) else one.text for one in self.children)


class _Reader(HTMLParser):
    """Builds the tree, and refuses an element that is closed by another's end."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("root")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in _VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(page: str) -> Node:
    """The tree of a page. AssertionError if an element is not closed in its place."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert [node.name for node in reader.open] == ["root"]
    return reader.root


def table_of(page: Node, caption: str) -> list[dict[str, Node]]:
    """The rows of the table of a caption, each cell by the title of its column."""
    for table in page.all("table"):
        (head,) = table.all("caption")
        if head.children[0] == caption:
            titles = [next(cell.all("span")).text for cell in table.one("thead").all("th")]
            rows = [
                [n for n in row.children if isinstance(n, Node)]
                for row in table.one("tbody").all("tr")
            ]
            return [dict(zip(titles, row, strict=True)) for row in rows]
    raise AssertionError(f"no table {caption!r}")
