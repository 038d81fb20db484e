"""Describes how the numbers in a report were produced."""

import math
from collections.abc import Iterable
from typing import Any

from dense_jax.report import comparable
from dense_jax.report.reading import RunFolder, number
from dense_jax.report.rows import ABSENT, FOLDS_NOTE, Report, Row, spelled, text
from dense_jax.spelling import some

BELOW = "†"  # marks scores of classes that are below a baseline
CAPTION_FACTS = "evaluation split", "images", "checkpoint"
VOID_POLICY = (
    "Ignored pixels count nowhere; means exclude classes absent from labels and predictions."
)


def manifest(report: Report) -> dict[str, Any]:
    """Returns the manifest for report.json: how each row was configured, trained and scored."""
    return {"void_policy": VOID_POLICY, "rows": [_row(report, row) for row in report.rows]}


def _row(report: Report, row: Row) -> dict[str, Any]:
    first, versions = row.runs[0], [_versions(run) for run in row.runs]
    return {
        "fields": dict(zip(report.fields, row.label, strict=True)),
        "config_hash": first.config_hash,
        "runs": [run.name for run in row.runs],
        "num_seeds": len({str(run.fields.get("seed")) for run in row.runs}),
        "num_folds": len({run.fold for run in row.runs} - {None}),
        "git_commits": _distinct(map(_commit, row.runs)),
        "dataset": first.fields.get("data.name"),
        "dataset_fingerprint": first.dataset.get("fingerprint"),
        "initial_weights": first.environment.get("initial_weights"),
        "tuning": first.tuning,
        "versions": {
            name: _distinct(version.get(name, ABSENT) for version in versions)
            for name in dict.fromkeys(name for version in versions for name in version)
        },
        "measured": first.measured,
        "classes_without_score": _unscored(row),
    }


def columns(report: Report) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the facts that all rows share, and {fact: [text of each row]} for other facts."""
    cells = {
        "config": [row.runs[0].config_hash for row in report.rows],
        report.units: [str(row.num_units) for row in report.rows],
        "git commit": [", ".join(_distinct(map(_short_commit, row.runs))) for row in report.rows],
        "training data": [_training_data(row.runs[0]) for row in report.rows],
        "initial weights": [_initial_weights(row.runs[0]) for row in report.rows],
        "scored on": [_measured(row.runs[0]) for row in report.rows],
        "classes without score": [", ".join(_unscored(row)) or "none" for row in report.rows],
        "versions": ["; ".join(_distinct(map(_version_text, row.runs))) for row in report.rows],
    }
    if any(row.runs[0].tuning for row in report.rows):
        cells["learning rate"] = [_learning_rate(row.runs[0]) for row in report.rows]
    shared = [f"{name}: {texts[0]}" for name, texts in cells.items() if len(set(texts)) == 1]
    differing = {name: texts for name, texts in cells.items() if len(set(texts)) > 1}
    return [VOID_POLICY, *shared], differing


def remarks(report: Report) -> list[str]:
    """Returns the notes below the table and its caption."""
    if not report.rows:
        return []
    runs = [run for row in report.rows for run in row.runs]
    sentences = [FOLDS_NOTE] if any(run.fold is not None for run in runs) else []
    if facts := comparable.conflicts(runs):
        groups = {row.group: row.runs[0] for row in report.rows}
        described = [
            f"data {group}: "
            + ", ".join(f"{fact} {run.measured.get(fact, 'unknown')}" for fact in facts)
            for group, run in groups.items()
        ]
        sentences.append(
            "Not comparable (--mixed): rows with different data were scored or tuned differently, "
            "so bold and tests compare only rows with equal data. " + "; ".join(described) + "."
        )
    if runs[0].scores is runs[0].final and len(report.rows) > 1:
        sentences.append("Differences are also tested over images with --split=SPLIT.")
    if any("boundary" in column.path for column in report.columns):
        sentences.append(
            "Boundary F1 (SegNet's BF, within 0.75 % of the diagonal) is averaged over each image's "
            "classes, then over images; boundary IoU, in rims 2 % of the diagonal wide, is computed "
            "over all images at once."
        )
    sentences += [*_tuning(report)[1:], *_without_network(report)]
    if len(report.rows) > 1:
        sentences.append(
            f"The baseline is {_baseline(report)}. Rows that share fewer than two {report.units} "
            f"with it are not tested over {report.units}. There is no correction for the number of "
            "columns."
        )
    commits = _distinct(map(_short_commit, runs))
    if len(commits) > 1:
        sentences.append(f"The runs are not of one git commit, but of {', '.join(commits)}.")
    if changed := [run.name for run in runs if _commit(run).endswith("+")]:
        sentences.append(
            f"{len(changed)} of {len(runs)} runs were made with changed files (+), so that their "
            f"commit alone does not reproduce them: {some(changed)}."
        )
    return sentences


def caption(report: Report) -> list[str]:
    """Returns what the score table shows, in sentences."""
    if not report.rows:
        return ["No run is finished yet."]
    runs = [run for row in report.rows for run in row.runs]
    names, units = report.style.names, report.units
    counts = [row.num_units for row in report.rows]
    dataset, split, images, checkpoint = (
        " or ".join(_distinct(values))
        for values in (
            [names.get(run.scored_dataset, run.scored_dataset) for run in runs],
            *([_fact(run, name) for run in runs] for name in CAPTION_FACTS),
        )
    )
    n = " to ".join(dict.fromkeys(map(str, (min(counts), max(counts)))))
    noun = units if max(counts) > 1 else units.removesuffix("s")
    interval = f"; ± is the half width of the 95 % t-interval over the {units}"
    about = f"Scores on {dataset}, split {split} ({images} images), of the {checkpoint} checkpoint."
    sentences = [about, f"Means over n = {n} {noun}{interval if max(counts) > 2 else ''}."]
    if min(counts) < 3:
        sentences.append(
            f"Rows with fewer than three {units} have no interval; the scores of two {units} are in "
            "parentheses."
        )
    if any(math.isnan(row.score(c.path)[0]) for row in report.rows for c in report.columns):
        sentences.append(f"{ABSENT}: a run has no score.")
    if len(report.rows) > 1:
        sentences.append("Bold: the best mean of a column.")
    if any(p_value < 0.05 for row in report.rows for p_value in row.p_values.values()):
        sentences.append(
            f"*: p < 0.05 against {_baseline(report)}, in a two-sided paired t-test over {units} "
            "with Holm's correction."
        )
    if any(row.below_baseline for row in report.rows):
        sentences.append(f"{BELOW}: a class has a lower IoU than without a network.")
    return sentences + _tuning(report)[:1]


def _fact(run: RunFolder, name: str) -> str:
    """Returns a fact about how a run was scored, or "unknown". It may be one of a single fold."""
    facts = {fact.partition(" of fold ")[0]: value for fact, value in run.measured.items()}
    return facts.get(name, "unknown")


def _tuning(report: Report) -> list[str]:
    """Returns how the learning rates were chosen, if any was tuned."""
    tuned = [row.runs[0] for row in report.rows if row.runs[0].tuning]
    if not tuned:
        return []
    tried = " or ".join(_distinct(run.measured["learning rates tried"] for run in tuned))
    sentences = [
        (
            f"Each row has its own learning rate, the best of {tried}, by the mean IoU of the best "
            "checkpoint on the evaluation split. The trials have a seed that is not in the table."
        )
    ]
    if any(run.is_scored_as_tuned for run in tuned):
        sentences.append("The scores are on the same split, and thus optimistic.")
    ends = [
        spelled(report.fields, row)
        for row in report.rows
        if (rates := row.runs[0].tuning.get("rates"))
        and _rate(row.runs[0]) in (min(rates), max(rates))
    ]
    if ends:
        about = "The best rate was the lowest or the highest, so that others may be better"
        sentences.append(f"{about}: {some(ends, 10)}.")
    return sentences


def _rate(run: RunFolder) -> Any:
    return run.fields.get("optimizer.learning_rate")


def _learning_rate(run: RunFolder) -> str:
    """Returns a run's learning rate, and the rates that were tried, with their scores."""
    if not run.tuning:
        return f"{_rate(run)}, not tuned"
    tried = ", ".join(
        f"{rate} ({'no score' if score is None else f'{score:.3f}'})"
        for rate, score in zip(run.tuning["rates"], run.tuning["scores"], strict=True)
    )
    return f"{_rate(run)} of {tried}"


def _baseline(report: Report) -> str:
    return next(spelled(report.fields, row) for row in report.rows if row.is_baseline)


def _without_network(report: Report) -> list[str]:
    """Returns the scores of `evaluation.baselines`, and the classes of lower IoU in each row."""
    scored: dict[str, list[tuple[float, str]]] = {}
    for run in (run for row in report.rows for run in row.runs):
        for name, baseline in run.baselines.items():
            if not math.isnan(score := number(baseline, "mean_iou")):
                scored.setdefault(name, []).append((score, text(baseline.get("is"))))
    stated = []
    for pairs in scored.values():  # each fold has scores of its own
        ends = dict.fromkeys(report.style.score(end(pairs)[0]) for end in (min, max))
        meanings = [*dict.fromkeys(meaning for _, meaning in pairs)]
        stated.append(f"{' to '.join(ends)} ({some(meanings, 1)})")
    below = [
        f"{spelled(report.fields, row)}: {text(row.below_baseline)}"
        for row in report.rows
        if row.below_baseline
    ]
    sentences = [f"Mean IoU without a network: {', '.join(stated)}."] if stated else []
    if below:
        sentences.append(
            f"{BELOW} marks classes whose IoU is lower than without a network, for any seed: "
            f"{some(below, 10)}."
        )
    return sentences


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


def _commit(run: RunFolder) -> str:
    return str(run.environment.get("git_commit") or "unknown")


def _short_commit(run: RunFolder) -> str:
    """Returns ten digits of the run's git commit, with "+" if there were uncommitted changes."""
    commit = _commit(run)
    return commit[:10] + ("+" if commit[10:].endswith("+") else "")


def _versions(run: RunFolder) -> dict[str, str]:
    versions = {"python": run.environment.get("python"), **run.environment.get("versions", {})}
    return {name: str(version) for name, version in versions.items() if version}


def _version_text(run: RunFolder) -> str:
    return ", ".join(f"{name} {version}" for name, version in _versions(run).items()) or "unknown"


def _training_data(run: RunFolder) -> str:
    name, split = run.fields.get("data.name"), run.fields.get("data.train_split")
    # Data created in memory has no fingerprint and is identified by name.
    files = "" if run.training_data == name else f", fingerprint {run.training_data}"
    return f"{name}, split {split}{files}"


def _initial_weights(run: RunFolder) -> str:
    """Names the weights that a run began with, and their license."""
    if "initial_weights" not in run.environment:
        return "unknown"
    origin = run.environment["initial_weights"]
    if not origin:
        return "random"
    return f"{origin.get('source')} (license: {origin.get('license') or 'not known'})"


def _measured(run: RunFolder) -> str:
    """Returns the facts in `run.measured` as text. Shortens the name "A of B" to "A"."""
    facts = (f"{fact.partition(' of ')[0]} {value}" for fact, value in run.measured.items())
    return ", ".join(facts)


def _unscored(row: Row) -> list[str]:
    """Returns the classes that have no score in at least one run."""
    scores = [item for run in row.runs for item in run.scores.items()]
    prefix = "eval/iou/"
    return _distinct(
        path.removeprefix(prefix)
        for path, score in scores
        if path.startswith(prefix) and score is None
    )
