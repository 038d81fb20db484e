"""Summarizes a folder of runs in tables: python -m dense_jax.report --workdir=DIR.

Writes these files to DIR:

  report.html              learning curves, class scores, confusion matrices and predictions
  report.md, .csv, .tex    the table of scores
  report_caption.tex       what the table of scores shows, for the caption of the LaTeX table
  report_seeds.tex         tests of the differences in each score over the seeds
  report.json              how each row was configured, trained and scored
  report_images.csv, .tex  with --split, tests of the differences in mean IoU over the images
  report_cost.csv, .tex    the costs of the runs
  figures/                 figures for a paper

A run is any folder at or below DIR with a config.json or failure.json. Each table row is one
configuration, labeled by the config fields that differ between rows. The rows are in the order of
the sweep. The runs of a row differ only in the seed, in the fold and in fields that cannot affect
scores. Each score is the mean over the seeds, or over the folds if there are any, with a 95%
t-interval if there are at least three, or else with both scores. An asterisk marks a significant
difference from the baseline row. Unfinished runs are listed below the table.

Without --split, the scores are from the end of training. With --split, the scores are from
`dense_jax.evaluate`, so each run must be evaluated first. A second table then tests whether each
row's difference from the baseline would hold on other images, for which one seed is enough. The
asterisks in the first table say whether it would hold for other seeds. The command fails if the
runs were not all scored in the same way, unless --mixed is set.
"""

from absl import flags

from dense_jax import command

if __name__ == "__main__":  # above the slow imports, so that --help answers at once
    command.define_folder(
        "workdir", "A folder of runs, or one run.", required=True, bucket="output"
    )
    flags.DEFINE_string(
        "split", None, "Split whose evaluations to show; by default the scores after training."
    )
    flags.DEFINE_bool("per_class", False, "Whether to add each class's IoU.")
    flags.DEFINE_string(
        "baseline",
        None,
        "Row to compare the others to, FIELD=VALUE,..., in old names; by default the first.",
    )
    flags.DEFINE_list("columns", None, "Scores to show, in this order, such as mean_iou,dice/car.")
    flags.DEFINE_list(
        "names",
        None,
        "New names OLD=NEW,... of fields, their values, scores and the dataset, such as "
        "upsampling=Upsampling,soft_dice=Dice,mean_iou=mIoU. Put double quotes around one that "
        "contains a comma.",
    )
    flags.DEFINE_integer(
        "digits", None, "Digits after the decimal point; by default 3, or 1 in percent.", 0
    )
    flags.DEFINE_bool("percent", False, "Whether to show scores in percent, except in CSV files.")
    flags.DEFINE_bool("mixed", False, "Whether runs that are not comparable may share the table.")
    command.help_if_asked()

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from dense_jax import buckets, storage
from dense_jax.report import figures, gallery, rows, tables
from dense_jax.report.manifest import manifest
from dense_jax.report.page import to_html

NOT_READ = ("checkpoints", "tensorboard", "pictures")  # folders of a run


def write(root: pathlib.Path, url: str = "", **options: Any) -> list[pathlib.Path]:
    """Writes the report files to `root`, the folder of the runs. Returns the files' paths.

    url: The folder in a bucket that `root` is a copy of, if any.
    options: The options of `rows.build`.
    """
    report = rows.build(root, **options)
    title, pictures = f"{root.resolve().name}: results", gallery.build(report.rows)
    about = {"manifest": manifest(report), "not_in_table": report.notes}
    texts = {
        "report.html": to_html(title, report, pictures),
        "report.md": tables.to_markdown(report),
        "report.csv": tables.to_csv(tables.score_table(report)),
        "report.tex": tables.to_latex(report),
        "report.json": json.dumps(about, indent=2) + "\n",
        "report_caption.tex": tables.caption_to_latex(report),
    }
    for name, (_, table, note, missing) in tables.sections(report).items():
        comments = [note, *missing]
        texts[f"report_{name}.tex"] = tables.latex_table(table, len(report.fields), comments)
        if name != "seeds":  # report.csv has these numbers
            texts[f"report_{name}.csv"] = tables.to_csv(table)
    for name, content in texts.items():
        content = rows.visible(content)
        content = content.replace(str(root), url) if url else content
        (root / name).write_text(content, encoding="utf-8")
    return [*(root / name for name in texts), *figures.write(root / "figures", report)]


def main(argv: Sequence[str]) -> None:
    """Writes the report and prints the names of its files."""
    args = flags.FLAGS
    names = "split", "per_class", "baseline", "mixed", "columns", "names", "digits", "percent"
    options = {name: getattr(args, name) for name in names}
    with storage.working_copy(args.workdir, NOT_READ) as root:
        url = args.workdir if buckets.is_url(args.workdir) else ""
        paths = write(root, url, **options)
    print("wrote", *(os.path.join(args.workdir, path.relative_to(root)) for path in paths))


if __name__ == "__main__":
    command.run(main)
