"""Scores a trained workdir: python -m dense_jax.evaluate --workdir=DIR [--split=test].

Writes DIR/evaluation_SPLIT.json and .md, and .npz with the confusion matrix of each image. Every
valid pixel of the split is counted exactly once, at the labels' own resolution; ignored pixels count
nowhere; a class that is neither in the labels nor predicted has no score (null) and is left out of
the means.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from etils import epath

from dense_jax import data, logger, mesh, metrics, scoring, train, workdir
from dense_jax.tiles import Tiles

MEANS = ("mean_iou", "mean_dice", "mean_accuracy", "pixel_accuracy", "frequency_weighted_iou")
PER_CLASS = ("iou", "dice", "accuracy", "precision", "binary_accuracy")


def evaluate(
    directory: str,
    split: str | None = None,
    checkpoint: str = "best",
    *,
    batch_size: int | None = None,
    tile_size: Sequence[int] | None = None,
    margin: int | None = None,
) -> dict[str, Any]:
    """Scores one split with one checkpoint; writes and returns evaluation_SPLIT.json.

    What is None is as in the run: its eval_split, and eval.batch_size in tiles per step,
    eval.tile_size and eval.margin in pixels. The scores do not depend on the batch size.
    """
    loaded = train.load(directory, checkpoint)
    config = loaded.config
    split = split or config.data.eval_split
    source = data.open_dataset(config.data.name, config.data.root, split)
    for field, there in (
        ("class_names", list(source.class_names)),
        ("num_channels", source.num_channels),
    ):
        if there != loaded.dataset[field]:
            raise ValueError(
                f"{config.data.root or config.data.name} has {field} {there}, but the run was "
                f"trained with {loaded.dataset[field]}"
            )
    tiles = Tiles(
        source,
        tile_size or config.eval.tile_size,
        config.eval.margin if margin is None else margin,
        loaded.run.context,
    )
    shardings = mesh.replicated(loaded.mesh), mesh.sharded(loaded.mesh)
    matrices, _ = scoring.score(
        jax.jit(mesh.map_examples(loaded.run.eval_step, loaded.mesh), out_shardings=shardings),
        loaded.variables,
        tiles,
        mesh=loaded.mesh,
        batch_size=batch_size or config.eval.batch_size,
        workers=config.data.workers,
    )
    counts = matrices.sum(axis=0, dtype=np.int64)
    low, high = (
        train.named_scores(ends, source.class_names) for ends in metrics.bootstrap(matrices)
    )
    of_images = [metrics.summarize(image) for image in matrices]
    over_images = {name: metrics.mean(np.array([s[name] for s in of_images])) for name in MEANS}
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
        **train.named_scores(metrics.summarize(counts), source.class_names),
        "intervals": {name: (low[name], high[name]) for name in low},
        "mean_over_images": over_images,
        "confusion_matrix": counts,
    }
    if jax.process_index() == 0:
        path = epath.Path(directory) / f"evaluation_{split}.json"
        workdir.write_json(path, evaluation)
        path.with_suffix(".md").write_text(markdown(evaluation))
        with path.with_suffix(".npz").open("wb") as file:
            np.savez_compressed(file, confusion_matrices=matrices)
    return evaluation


def markdown(evaluation: dict[str, Any]) -> str:
    """The means, and a table with a row per class, in percent."""

    def percent(value: float) -> str:
        return "no score" if np.isnan(value) else f"{100 * value:.2f}"

    def interval(name: str) -> str:
        low, high = evaluation["intervals"][f"eval/{name}"]
        return "" if np.isnan(low) else f"{100 * low:.2f} to {100 * high:.2f}"

    def both(name: str) -> str:
        return f"{percent(evaluation[f'eval/{name}'])} ({interval(name)})".removesuffix(" ()")

    def row(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    about = (
        f"{evaluation['num_images']} images, {evaluation['num_pixels']} valid pixels, at the "
        "labels' own resolution. Ignored pixels count nowhere; a class neither in the labels nor "
        "predicted has no score and is not in the means. In percent, with 95 % intervals over "
        "images (bootstrap); the mean over images is of each image's own score, another measure."
    )
    lines = [
        f"# {evaluation['dataset']} {evaluation['split']}, step {evaluation['step']}",
        "",
        about,
        "",
        row("", *(name.replace("_", " ") for name in MEANS)),
        row("---", *(["---:"] * len(MEANS))),
        row("all pixels", *(percent(evaluation[f"eval/{name}"]) for name in MEANS)),
        row("95 % interval", *map(interval, MEANS)),
        row("mean over images", *(percent(evaluation["mean_over_images"][n]) for n in MEANS)),
        "",
        row("class", *(name.replace("_", " ") for name in PER_CLASS)),
        row("---", *(["---:"] * len(PER_CLASS))),
        *(
            row(name.replace("|", "\\|"), *(both(f"{metric}/{name}") for metric in PER_CLASS))
            for name in evaluation["class_names"]
        ),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Evaluates and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logger.show_own_lines()
    args = flags.FLAGS
    evaluation = evaluate(
        args.workdir,
        args.split,
        args.checkpoint,
        batch_size=args.batch_size,
        tile_size=args.tile_size and [int(length) for length in args.tile_size],
        margin=args.margin,
    )
    print(markdown(evaluation))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Of a run of dense_jax.main.", required=True)
    flags.DEFINE_string("split", None, "Which to score; by default the run's eval_split.")
    flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
    flags.DEFINE_integer("batch_size", None, "Tiles per step; by default the run's.")
    flags.DEFINE_list("tile_size", None, "HEIGHT,WIDTH in pixels; by default the run's.")
    flags.DEFINE_integer("margin", None, "Context in pixels; by default the run's.")
    app.run(main)
