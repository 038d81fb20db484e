"""Summarizes a folder of runs in tables: python -m dense_jax.report --workdir=DIR.

Writes these files to DIR:

  report.html              learning curves, class scores, confusion matrices and predictions
  report.md, .csv, .tex    the table of scores
  report.json              how each row was configured, trained and scored
  report_cost.csv, .tex    the costs of the runs
  figures/                 figures for a paper

A run is any folder at or below DIR with a config.json or failure.json. Each table row is one
configuration, labeled by the fields in which the rows differ. The runs of a row may differ only in
the seed and in fields that cannot change a score. Each score is the mean over the seeds. If there
are at least two seeds, the score has a 95% t-interval. An asterisk marks a significant difference
from the baseline row. Unfinished runs are not in the table, but are listed below the table.

Without --split, the scores are from the end of training. With --split, the scores are from
`dense_jax.evaluate`, so each run must be evaluated first. If runs were scored differently, the
command fails unless --mixed is set.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from dense_jax import command
from dense_jax.report import figures, gallery, rows, tables
from dense_jax.report.manifest import manifest
from dense_jax.report.page import to_html


def write(root: pathlib.Path, num_pictures: int = 12, **options: Any) -> list[pathlib.Path]:
    """Writes a report on the runs in `root` to `root`. Returns the paths of the written files.

    num_pictures: The number of images in the gallery of report.html.
    options: The options of `rows.build`.
    """
    report = rows.build(root, **options)
    title, pictures = f"{root.resolve().name}: results", gallery.build(report.rows, num_pictures)
    about = {"manifest": manifest(report), "not_in_table": report.notes}
    texts = {
        "report.html": to_html(title, report, pictures),
        "report.md": tables.to_markdown(report),
        "report.csv": tables.to_csv(tables.score_table(report)),
        "report.tex": tables.to_latex(report),
        "report.json": json.dumps(about, indent=2) + "\n",
        "report_cost.csv": tables.to_csv(tables.cost_table(report)),
        "report_cost.tex": tables.cost_to_latex(report),
    }
    for name, content in texts.items():
        (root / name).write_text(rows.visible(content), encoding="utf-8")
    return [*(root / name for name in texts), *figures.write(root / "figures", report)]


def main(argv: Sequence[str]) -> None:
    """Writes the report and prints the names of its files."""
    args = flags.FLAGS
    options = {name: getattr(args, name) for name in ("split", "per_class", "baseline", "mixed")}
    print("wrote", *write(pathlib.Path(args.workdir), args.gallery, **options))


if __name__ == "__main__":
    command.define_folder("workdir", "A folder of runs, or one run.", required=True)
    flags.DEFINE_string(
        "split", None, "Split whose evaluation to show; by default training's last."
    )
    flags.DEFINE_bool("per_class", False, "Whether to add each class's IoU.")
    flags.DEFINE_string(
        "baseline", None, "FIELD=VALUE,... of the row to test against; by default the first."
    )
    flags.DEFINE_bool("mixed", False, "Whether runs that are not comparable may share the table.")
    flags.DEFINE_integer("gallery", 12, "Images in report.html, the worst; 0: none.", lower_bound=0)
    command.run(main)
