"""Turns a folder of runs into tables: python -m dense_jax.report --workdir=DIR.

Writes DIR/report.html (one page, with curves, classes, confusions and pictures), .md, .csv, .tex and
.json (the manifest), what the runs cost to DIR/report_cost.csv and .tex, and DIR/figures/, for a
paper. A run is any folder at or below DIR with a config.json. A row is one configuration, shown by
the fields in which the rows differ; its runs may differ in their seed and in what cannot change a
score. A cell is the mean over the seeds, with a 95 % t-interval
where there are two or more, and a mark where it differs from the baseline row's. A run that did not
finish is never part of a mean: it is named below the table.

Scores are those of the end of training; with --split those of `dense_jax.evaluate`, which must have
been called for each run. Runs that were not scored alike are not put into one table unasked.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from dense_jax import command
from dense_jax.report import figures, gallery, tables
from dense_jax.report.manifest import manifest
from dense_jax.report.page import to_html
from dense_jax.report.runs import build, visible


def write(
    root: pathlib.Path,
    num_pictures: int = 12,
    *,
    split: str | None = None,
    per_class: bool = False,
    baseline: str | None = None,
    mixed: bool = False,
) -> list[pathlib.Path]:
    """Writes the files of a report into `root`; arguments and errors are those of `runs.build`.

    num_pictures: images in the page's gallery.
    """
    fields, rows, notes = build(
        root, split=split, per_class=per_class, baseline=baseline, mixed=mixed
    )
    title, pictures = f"{root.resolve().name}: results", gallery.build(rows, num_pictures)
    about = {"manifest": manifest(fields, rows), "not_in_table": notes}
    texts = {
        "report.html": to_html(title, fields, rows, notes, pictures),
        "report.md": tables.to_markdown(fields, rows, notes),
        "report.csv": tables.to_csv(fields, rows, notes),
        "report.tex": tables.to_latex(fields, rows, notes),
        "report.json": json.dumps(about, indent=2) + "\n",
        "report_cost.csv": tables.cost_to_csv(fields, rows),
        "report_cost.tex": tables.cost_to_latex(fields, rows),
    }
    for name, content in texts.items():
        (root / name).write_text(visible(content), encoding="utf-8")
    return [*(root / name for name in texts), *figures.write(root / "figures", fields, rows)]


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    paths = write(
        pathlib.Path(args.workdir),
        args.gallery,
        split=args.split,
        per_class=args.per_class,
        baseline=args.baseline,
        mixed=args.mixed,
    )
    print("wrote", *paths)


if __name__ == "__main__":
    command.define_folder("workdir", "A folder of runs, or one run.", required=True)
    flags.DEFINE_string("split", None, "Whose evaluation to show; by default training's last.")
    flags.DEFINE_bool("per_class", False, "Whether to add each class's IoU.")
    flags.DEFINE_string(
        "baseline", None, "FIELD=VALUE,... of the row to test against; by default the first."
    )
    flags.DEFINE_bool("mixed", False, "Whether runs that are not comparable may share the table.")
    flags.DEFINE_integer("gallery", 12, "Images in report.html, the worst; 0: none.", lower_bound=0)
    command.run(main)
