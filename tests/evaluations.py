"""An evaluation with a figure of every kind, for tests of what shows it."""

from __future__ import annotations

from reap2gguf.bundle.evaluation import (
    Answer,
    Comparison,
    Divergence,
    Estimate,
    Evaluation,
    SmokeTest,
    Speed,
    TaskScore,
    TextRecord,
    VariantRecord,
)


def divergence_of(mean: float) -> Divergence:
    """A divergence with this mean, and figures that go with it."""
    return Divergence(
        mean=Estimate(mean, mean / 50),
        median=Estimate(mean / 3, mean / 60),
        p90=Estimate(mean * 2.5, mean / 20),
        p99=Estimate(mean * 9, mean / 4),
        p999=Estimate(mean * 20, mean),
        maximum=mean * 40,
        same_top=Estimate(1 - mean, 0.002),
        rms_probability=Estimate(mean / 2, mean / 100),
        perplexity_ratio=Estimate(1 + mean, mean / 20),
    )


def variant_of(kind: str, name: str, perplexity: float, n_bytes: int, bits: float) -> VariantRecord:
    """A variant of the tiny example: the source has 16 experts, all others 12."""
    n_experts = 16 if kind == "source" else 12
    return VariantRecord(name, kind, Estimate(perplexity, 0.08), n_experts, n_bytes, bits)  # type: ignore[arg-type]


Q4, Q8 = "tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"
EXAMPLE = Evaluation(
    engine="streamed",
    text=TextRecord("wikitext2", "ab" * 32, 61_440, 120, 512, 30_600, has_bos=False),
    variants=[
        variant_of("source", "source", 9.54, 29_000_000, 16.0),
        variant_of("pruned", "pruned", 9.91, 22_700_000, 16.0),
        variant_of("gguf", Q8, 9.92, 12_200_000, 8.6),
        variant_of("gguf", Q4, 10.05, 7_300_000, 5.1),
    ],
    comparisons=[
        Comparison("source", "pruned", divergence_of(0.12)),
        Comparison("pruned", Q8, divergence_of(0.0008)),
        Comparison("source", Q8, divergence_of(0.121)),
        Comparison("pruned", Q4, divergence_of(0.021)),
        Comparison("source", Q4, divergence_of(0.14)),
    ],
    tasks=[
        TaskScore("arc_easy", variant, metric, Estimate(score, 0.03), 250)
        for variant, scores in (
            ("source", (0.48, 0.46)),
            ("pruned", (0.45, 0.44)),
            (Q8, (0.45, 0.44)),
            (Q4, (0.44, 0.42)),
        )
        for metric, score in zip(("acc", "acc_norm"), scores, strict=True)
    ],
    speeds=[
        Speed(Q4, "pp512", Estimate(812.5, 4.1), 2, on_gpu=False, peak_bytes=64_000_000),
        Speed(Q4, "tg128", Estimate(97.3, 0.6), 2, on_gpu=False, peak_bytes=64_000_000),
    ],
    smoke_tests=[
        SmokeTest(
            Q4,
            "What is two and two?",
            has_template=True,
            llama_cpp=Answer("Q: What is two and two?", (5, 6, 7), (8, 9), " It is"),
            transformers=Answer("Q: What is two and two?", (5, 6, 7), (8, 1), " It was"),
        ),
        SmokeTest(Q8, "Why?", False, Answer("Why?", (2,), (3,), "So"), None, "it is too large"),
    ],
    made_with={"reap2gguf": "0.1.0", "torch": "2.13.0"},
)
