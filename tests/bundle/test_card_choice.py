from __future__ import annotations

from dataclasses import replace

from reap2gguf.bundle.card_choice import choice_section, choices
from reap2gguf.bundle.evaluation import Comparison, Estimate, VariantRecord
from reap2gguf.bundle.manifest import GgufRecord, Manifest, SideRecord
from tests.bundle.test_manifest import sample
from tests.evaluations import EXAMPLE, divergence_of

GIB = 2**30


def file(label: str, gib: float, bits: float) -> GgufRecord:
    return replace(
        sample().gguf[0], file=f"x-{label}.gguf", label=label, n_bytes=int(gib * GIB),
        bits_per_weight=bits,
    )  # fmt: skip


FILES = (file("Q8_0", 30, 8.5), file("Q4_K_M", 16, 4.8), file("IQ2_M", 9, 2.7))


def labels(manifest: Manifest) -> list[tuple[str, str]]:
    return [(one.title, one.record.label) for one in choices(manifest)]


def measured(**means: tuple[float, float]) -> Manifest:
    """With these divergences from the source, by label."""
    comparisons = [
        Comparison("source", f"x-{label}.gguf", replace(divergence_of(0.1), mean=Estimate(*mean)))
        for label, mean in means.items()
    ]
    source = VariantRecord("source", "source", Estimate(9, 0.1), 16, 1, 16.0)
    variants = [source, *(replace(source, name=f"x-{n}.gguf", kind="gguf") for n in means)]
    evaluation = replace(EXAMPLE, variants=variants, comparisons=comparisons, tasks=(), speeds=())
    return replace(sample(), gguf=FILES, evaluation=evaluation)


def test_without_figures_the_largest_that_fits() -> None:
    manifest = replace(sample(), gguf=FILES)
    assert labels(manifest) == [
        ("from 12 GiB", "IQ2_M"), ("from 24 GiB", "Q4_K_M"), ("from 48 GiB", "Q8_0"),
    ]  # fmt: skip
    text = choice_section(manifest)
    assert "| from 24 GiB | `Q4_K_M` | `x-Q4_K_M.gguf` |" in text
    assert "not compared by quality" in text


def test_the_projector_takes_memory_too() -> None:
    side = SideRecord("mmproj.gguf", "", 2 * GIB, {})
    found = labels(replace(sample(), gguf=FILES, side_files=(side,)))
    assert found[0] == ("from 16 GiB", "IQ2_M")


def test_with_figures_the_closest_that_fits() -> None:
    found = labels(measured(Q8_0=(0.10, 0.001), Q4_K_M=(0.12, 0.001), IQ2_M=(0.3, 0.01)))
    assert [label for _, label in found] == ["IQ2_M", "Q4_K_M", "Q8_0"]
    manifest = measured(Q8_0=(0.30, 0.001), Q4_K_M=(0.12, 0.001), IQ2_M=(0.3, 0.01))
    assert [label for _, label in labels(manifest)] == ["IQ2_M", "Q4_K_M"]
    assert "lowest KL divergence" in choice_section(manifest)


def test_of_files_that_are_alike_the_smallest() -> None:
    found = labels(measured(Q8_0=(0.100, 0.003), Q4_K_M=(0.102, 0.003), IQ2_M=(0.3, 0.01)))
    assert [label for _, label in found] == ["IQ2_M", "Q4_K_M"]


def test_some_figures_are_none() -> None:
    manifest = measured(Q8_0=(0.1, 0.001))
    assert [label for _, label in labels(manifest)] == ["IQ2_M", "Q4_K_M", "Q8_0"]


def test_a_single_file_is_no_choice() -> None:
    assert choice_section(replace(sample(), gguf=FILES[:1])) == ""


def test_files_for_no_machine() -> None:
    huge = (file("Q8_0", 3000, 8.5), file("Q4_K_M", 2000, 4.8))
    assert labels(replace(sample(), gguf=huge)) == [("from 2.15 TiB", "Q4_K_M")]
