"""What the numbers of a report were made of, and what its reader must know besides."""

from collections.abc import Iterable, Sequence
from typing import Any

from dense_jax.report import comparable
from dense_jax.report.reading import Run, mapping
from dense_jax.report.runs import ABSENT, BOUNDARY_METRICS, Row, spelled

VOID_POLICY = (
    "Ignored pixels count nowhere; classes absent from labels and predictions are in no mean."
)


def manifest(fields: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """For report.json: of each row its config's hash, commits, data, versions and measurement."""
    return {
        "void_policy": VOID_POLICY,
        "rows": [
            {
                "fields": dict(zip(fields, row.label, strict=True)),
                "config_hash": row.runs[0].config_hash,
                "runs": [run.name for run in row.runs],
                "num_seeds": len(row.runs),
                "git_commits": _distinct(_commit(run) for run in row.runs),
                "dataset": row.runs[0].fields.get("data.name"),
                "dataset_fingerprint": row.runs[0].dataset.get("fingerprint"),
                "versions": {
                    name: _distinct(_versions(run).get(name, ABSENT) for run in row.runs)
                    for name in dict.fromkeys(name for run in row.runs for name in _versions(run))
                },
                "measured": row.runs[0].measured,
                "classes_without_score": _distinct(c for run in row.runs for c in _unscored(run)),
            }
            for row in rows
        ],
    }


def manifest_table(
    fields: Sequence[str], rows: Sequence[Row]
) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """The manifest for a reader: what holds for all rows, in words; and what does not, by row.

    The table is as of `tables.table`.
    """
    columns: dict[str, list[str]] = {
        "config": [row.runs[0].config_hash for row in rows],
        "seeds": [str(len(row.runs)) for row in rows],
        "git commit": [", ".join(_distinct(map(_short_commit, row.runs))) for row in rows],
        "training data": [_training_data(row.runs[0]) for row in rows],
        "scored on": [_scored_on(row.runs[0]) for row in rows],
        "classes without score": [
            ", ".join(_distinct(c for run in row.runs for c in _unscored(run))) or "none"
            for row in rows
        ],
        "versions": ["; ".join(_distinct(map(_version_text, row.runs))) for row in rows],
    }
    shared = {name: cells[0] for name, cells in columns.items() if len(set(cells)) == 1}
    differing = {name: cells for name, cells in columns.items() if name not in shared}
    lines = [VOID_POLICY, *(f"{name}: {cell}" for name, cell in shared.items())]
    body = [
        [(cell, False) for cell in (*row.label, *cells)]
        for row, *cells in zip(rows, *differing.values(), strict=True)
    ]
    return lines, [[(name, False) for name in (*fields, *differing)], *body]


def remarks(fields: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Sentences on how this table was made; those on its columns are in NOTE."""
    if not rows:
        return []
    runs = [run for row in rows for run in row.runs]
    said = []
    if different := comparable.conflicts(runs):
        kinds = {row.group: row.runs[0] for row in rows}
        described = [
            f"data {group}: "
            + ", ".join(f"{what} {run.measured.get(what, 'not known')}" for what in different)
            for group, run in kinds.items()
        ]
        said.append(
            "Not comparable (--mixed): scores of rows with different data were not measured alike, "
            "so bold and tests are within one. " + "; ".join(described) + "."
        )
    if runs[0].scores is runs[0].final:
        said.append("Scores are those of the end of training, on each run's evaluation split.")
    else:
        checkpoints = _distinct(run.measured["checkpoint"] for run in runs)
        said.append(
            "Scores are those of dense_jax.evaluate on split "
            f"{runs[0].measured.get('evaluation split', 'unknown')}, with the "
            f"{' or '.join(checkpoints)} checkpoint of each run."
        )
        if any(path in rows[0].metrics for path in BOUNDARY_METRICS):
            said.append(
                "Boundary F1 is the mean over images of their classes (SegNet's BF), within 0.75 % "
                "of the diagonal; boundary IoU is of all images' rims together, of 2 % of it."
            )
    if len(rows) > 1:
        (baseline,) = (spelled(fields, row) for row in rows if row.is_baseline)
        said.append(
            f"The baseline is {baseline}. Rows that share fewer than two seeds "
            "with it are not tested. There is no correction for the number of columns."
        )
    commits = _distinct(map(_short_commit, runs))
    if len(commits) > 1:
        said.append(f"The runs are not of one git commit, but of {', '.join(commits)}.")
    if changed := [run.name for run in runs if _commit(run).endswith("+")]:
        said.append(
            f"{len(changed)} of {len(runs)} runs were made with changed files (+), so that their "
            f"commit alone does not give them again: {comparable.some(changed)}."
        )
    return said


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


def _commit(run: Run) -> str:
    return str(run.environment.get("git_commit") or "unknown")


def _short_commit(run: Run) -> str:
    """Ten digits, and the mark of changed files."""
    commit = _commit(run)
    return commit[:10] + ("+" if commit[10:].endswith("+") else "")


def _versions(run: Run) -> dict[str, str]:
    versions = {"python": run.environment.get("python"), **mapping(run.environment.get("versions"))}
    return {name: str(version) for name, version in versions.items() if version}


def _version_text(run: Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in _versions(run).items()) or "unknown"


def _training_data(run: Run) -> str:
    name, split = run.fields.get("data.name"), run.fields.get("data.train_split")
    # Data made in memory has no fingerprint but its name.
    files = "" if run.training_data == name else f", fingerprint {run.training_data}"
    return f"{name}, split {split}{files}"


def _scored_on(run: Run) -> str:
    measured = run.measured
    parts = [f"split {measured.get('evaluation split', 'unknown')}"]
    if "images" in measured:
        parts.append(f"{measured['images']} images of {measured.get('valid pixels')} valid pixels")
    parts.append(f"at resolution: {measured.get('resolution', 'unknown')}")
    parts += [f"tiles of {value}" for what, value in measured.items() if what.startswith("tiles")]
    return ", ".join([*parts, f"{measured['checkpoint']} checkpoint"])


def _unscored(run: Run) -> list[str]:
    """Classes in no label and never predicted."""
    prefix = "eval/iou/"
    return [
        path.removeprefix(prefix)
        for path, score in (run.scores or {}).items()
        if path.startswith(prefix) and score is None
    ]
