"""Scores a trained workdir: python -m dense_jax.evaluate --workdir=DIR [--split=test].

Writes DIR/evaluation_SPLIT.json and .md. Every valid pixel of the split is counted exactly once,
at the labels' own resolution; ignored pixels count nowhere; a class that is neither in the labels
nor predicted has no score (null) and is left out of the means.
"""

from typing import Any

import jax
import numpy as np
from absl import app, flags
from etils import epath

from dense_jax import data, mesh, scoring, train, workdir
from dense_jax.tiles import Tiles

_WORKDIR = flags.DEFINE_string("workdir", None, "Of a run of dense_jax.main.")
_SPLIT = flags.DEFINE_string("split", None, "Which to score; by default the run's eval_split.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Tiles per step; by default the run's.")
_TILE_SIZE = flags.DEFINE_list("tile_size", None, "HEIGHT,WIDTH in pixels; by default the run's.")
_MARGIN = flags.DEFINE_integer("margin", None, "Context in pixels; by default the run's.")

MEANS = ("mean_iou", "mean_dice", "mean_accuracy", "pixel_accuracy", "frequency_weighted_iou")
PER_CLASS = ("iou", "dice", "accuracy", "precision", "binary_accuracy")


def main(argv: list[str]) -> None:
    """Restores, scores, writes and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    loaded = train.load(_WORKDIR.value, _CHECKPOINT.value)
    config = loaded.config
    split = _SPLIT.value or config.data.eval_split
    source = data.open_dataset(config.data.name, config.data.root, split)
    if source.class_names != tuple(loaded.dataset["class_names"]):
        raise ValueError(
            f"the classes of {config.data.root or config.data.name} are {source.class_names}, but "
            f"the run was trained on {tuple(loaded.dataset['class_names'])}"
        )
    tiles = Tiles(
        source,
        list(map(int, _TILE_SIZE.value or config.eval.tile_size)),
        config.eval.margin if _MARGIN.value is None else _MARGIN.value,
    )
    sharding = mesh.replicated(loaded.mesh), mesh.sharded(loaded.mesh)
    counts, _ = scoring.score(
        jax.jit(loaded.run.eval_step, out_shardings=sharding),
        loaded.variables,
        tiles,
        mesh=loaded.mesh,
        batch_size=_BATCH_SIZE.value or config.eval.batch_size,
        workers=config.data.workers,
    )
    evaluation = {
        "dataset": config.data.name,
        "dataset_fingerprint": source.fingerprint,
        "split": split,
        "step": loaded.step,
        "num_images": len(source),
        "num_pixels": int(counts.sum()),
        "resolution": "the labels' own",
        "tile_size": tiles.tile_size,
        "margin": tiles.margin,
        "class_names": source.class_names,
        **train.named_scores(counts, source.class_names),
        "confusion_matrix": counts,
    }
    path = epath.Path(_WORKDIR.value).resolve() / f"evaluation_{split}"
    text = markdown(evaluation)
    if jax.process_index() == 0:
        workdir.write_json(path.with_suffix(".json"), evaluation)
        path.with_suffix(".md").write_text(text)
    print(f"{text}\nwritten to {path}.json and .md")


def markdown(evaluation: dict[str, Any]) -> str:
    """The means, and a table with a row per class, in percent."""

    def percent(name: str) -> str:
        value = evaluation[f"eval/{name}"]
        return "no score" if np.isnan(value) else f"{100 * value:.2f}"

    def row(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [
        f"# {evaluation['dataset']} {evaluation['split']}, step {evaluation['step']}",
        "",
        f"{evaluation['num_images']} images, {evaluation['num_pixels']} valid pixels, at the "
        "labels' own resolution. Ignored pixels count nowhere; a class neither in the labels nor "
        "predicted has no score and is not in the means. In percent.",
        "",
        row(*(name.replace("_", " ") for name in MEANS)),
        row(*(["---:"] * len(MEANS))),
        row(*map(percent, MEANS)),
        "",
        row("class", *(name.replace("_", " ") for name in PER_CLASS)),
        row("---", *(["---:"] * len(PER_CLASS))),
        *(
            row(name.replace("|", "\\|"), *(percent(f"{metric}/{name}") for metric in PER_CLASS))
            for name in evaluation["class_names"]
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    app.run(main)
