"""Turns a folder of runs into tables: python -m dense_jax.report --workdir=DIR.

Writes DIR/report.html (one page, with curves, classes, confusions and pictures), .md, .csv and .tex,
and DIR/figures/, for a paper. A run is any folder at or below
DIR with a config.json. A row is one configuration, shown by the fields in which the rows differ;
its runs may differ in their seed and in what cannot change a score. A cell is the mean over the
seeds of the final scores, with a 95 % t-interval where there are two or more. A run that did not
finish is never part of a mean: it is named below the table.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from dense_jax.report import figures, gallery
from dense_jax.report.page import to_html
from dense_jax.report.runs import build
from dense_jax.report.tables import to_csv, to_latex, to_markdown


def write(root: pathlib.Path, num_pictures: int) -> list[pathlib.Path]:
    """Writes report.html, .md, .csv, .tex and figures into `root`; ValueError if it holds no run."""
    found = build(root)
    pictures = gallery.build(found[1], num_pictures)
    texts = {"html": to_html(f"{root.resolve().name}: results", *found, pictures)}
    texts |= {"md": to_markdown(*found), "csv": to_csv(*found), "tex": to_latex(*found)}
    for ending, content in texts.items():
        (root / f"report.{ending}").write_text(content, encoding="utf-8")
    written = [root / f"report.{ending}" for ending in texts]
    return [*written, *figures.write(root / "figures", *found[:2])]


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    root = pathlib.Path(flags.FLAGS.workdir)
    try:
        print("wrote", *write(root, flags.FLAGS.gallery))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A folder of runs, or one run.", required=True)
    flags.DEFINE_integer("gallery", 12, "Images in report.html, the worst; 0: none.")
    app.run(main)
