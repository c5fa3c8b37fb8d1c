"""Results of builds and pushes for programs, as plain JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.building.stage import BuildResult
    from reap2gguf.publishing.push import Preview, Published


def result_as_json(result: BuildResult, log: Path | None = None) -> dict[str, Any]:
    """What a build or an addition wrote and cost; `stages` is empty if it was up to date."""
    manifest = result.manifest
    gguf = [
        {
            "path": str(result.gguf_folder / record.file),
            "recipe": record.recipe,
            "file_type": record.file_type,
            "bytes": record.n_bytes,
        }
        for record in manifest.gguf
    ]
    sides = [
        {"path": str(result.gguf_folder / side.file), "title": side.title, "bytes": side.n_bytes}
        for side in manifest.side_files
    ]
    return {
        "name": manifest.name,
        "up_to_date": not result.stages,
        "hf_folder": None if result.hf_folder is None else str(result.hf_folder),
        "gguf_folder": str(result.gguf_folder),
        "log": None if log is None else str(log),
        "safetensors_bytes": 0 if manifest.hf is None else manifest.hf.n_bytes,
        "parameters": manifest.n_parameters,
        "files": gguf,
        "side_files": sides,
        "stages": [
            {
                "name": stage.name,
                "began": stage.began,
                "seconds": stage.seconds,
                "peak_bytes": stage.peak_bytes,
                "reused": stage.reused,
            }
            for stage in result.stages
        ],
        "verified": list(manifest.verification["passed"]),
        "choice": None if manifest.choice is None else asdict(manifest.choice),
        "budget": None if manifest.budget is None else asdict(manifest.budget),
        "evaluation": None if manifest.evaluation is None else manifest.evaluation.as_json(),
    }


def published_as_json(published: Published) -> dict[str, Any]:
    """Where a push has put a bundle."""
    return {"urls": list(published.urls), "other_files": list(published.others)}


def preview_as_json(found: Preview) -> dict[str, Any]:
    """What a push would do; `state` is null where the Hub did not answer."""
    return {
        "repositories": [
            {
                "repository": repo.repo,
                "bytes": repo.n_bytes,
                "exists": None if found.remote is None else found.remote.get(repo.repo) is not None,
                "files": [
                    {
                        "file": file.name,
                        "bytes": file.n_bytes,
                        "state": None if found.remote is None else found.state(repo.repo, file),
                    }
                    for file in repo.files
                ],
                "removed": list(found.outdated.get(repo.repo, ())),
            }
            for repo in found.prepared.repos
        ],
        "warnings": list(found.prepared.warnings),
        "not_checked": list(found.unchecked),
    }
