"""Tests the permutation test and the bootstrap over images against independent references."""

import csv
import io
import itertools
import json

import numpy as np
import pytest
import scipy.stats

from dense_jax import metrics
from dense_jax.report import over_images, page, statistics, tables
from dense_jax.report.__main__ import write
from dense_jax.report.rows import build
from tests.report.test_tables import DATASET, EVALUATION, add

CLASSES = ["sky", "road", "car"]


def draw_labels(random, n):
    """Numbers of true pixels of 3 classes in n images, of which some lack the last class."""
    labels = random.integers(1, 60, (n, 3))
    labels[: n // 2, 2] = 0
    return labels


def draw_matrices(random, labels, accuracy):
    """Confusion matrices [n, c, c] of predictions that are right with this probability."""
    wrong = (1 - accuracy) / (labels.shape[1] - 1)
    chances = np.where(np.eye(labels.shape[1]), accuracy, wrong)
    return random.multinomial(labels, chances)


def to_counts(matrices):
    """The counts of matrices [n, s, c, c]."""
    hit = np.einsum("nscc->nsc", matrices)
    return np.stack([hit, matrices.sum(axis=2), matrices.sum(axis=3)], axis=1).astype(np.float64)


def split_score(matrices):
    """The mean IoU over all pixels, averaged over the seeds, of matrices [n, s, c, c]."""
    return np.mean([metrics.summarize(seed)["mean_iou"] for seed in matrices.sum(axis=0)])


def two_rows(seed, n, num_seeds=1, accuracies=(0.7, 0.75)):
    """The matrices [n, s, c, c] of two rows. Images differ in how hard they are for both."""
    random = np.random.default_rng(seed)
    labels, hard = draw_labels(random, n), random.uniform(-0.2, 0.2, (n, 1, 1))
    return [
        np.stack([draw_matrices(random, labels, a + hard) for _ in range(num_seeds)], axis=1)
        for a in accuracies
    ]


def write_evaluation(folder, names, matrices, **changes):
    """An evaluation on split test of images with these confusion matrices [n, c, c]."""
    scores = metrics.named_scores(metrics.summarize(matrices.sum(axis=0)), CLASSES)
    evaluation = EVALUATION | {"class_names": CLASSES, "num_images": len(names), **scores}
    evaluation |= {"num_pixels": int(matrices.sum()), **changes}
    evaluation["confusion_matrix"] = matrices.sum(axis=0).tolist()
    (folder / "evaluation_test.json").write_text(json.dumps(evaluation))
    np.savez(folder / "evaluation_test.npz", names=names, confusion_matrices=matrices)


def add_rows(root, n=16, seeds=(0, 1), **accuracies):
    """Evaluated runs of rows with these losses and accuracies, on the same labels."""
    random = np.random.default_rng(0)
    labels = draw_labels(random, n)
    names = np.array([f"image{i:02d}" for i in range(n)])
    kept = {}
    for loss, accuracy in accuracies.items():
        for seed in seeds:
            name = f"{loss}-{seed}"
            files = {"dataset": DATASET | {"class_names": CLASSES}}
            add(root, name, files=files, loss=loss, seed=seed)
            kept[name] = draw_matrices(random, labels, accuracy)
            write_evaluation(root / name, names, kept[name])
    return names, kept


def image_tests(root, **options):
    """{loss: its test over images} of a report on split test."""
    return {row.name: row.image_test for row in build(root, "test", **options).rows}


# The statistics


def test_the_score_is_that_of_metrics_without_absent_classes():
    matrices = np.random.default_rng(0).integers(0, 9, (4, 2, 3, 3))
    matrices[:, 0, 2] = matrices[:, 0, :, 2] = 0  # with the first seed, the last class is nowhere
    sums = to_counts(matrices).sum(axis=0)
    np.testing.assert_allclose(over_images.mean_iou(sums), split_score(matrices), rtol=1e-12)
    stacked = over_images.mean_iou(np.stack([sums, 0 * sums]))
    np.testing.assert_array_equal(stacked, [over_images.mean_iou(sums), np.nan])


@pytest.mark.parametrize("seed", range(4))
def test_the_p_value_counts_all_swaps_of_images(seed):
    ours, theirs = two_rows(seed, n=6, num_seeds=2)
    sizes = []
    for swaps in itertools.product([False, True], repeat=6):
        swapped = np.array(swaps)[:, None, None, None]
        first, second = np.where(swapped, theirs, ours), np.where(swapped, ours, theirs)
        sizes.append(abs(split_score(first) - split_score(second)))
    expected = sum(size >= sizes[0] - 1e-12 for size in sizes) / 64
    assert over_images.swap_p_value(to_counts(ours), to_counts(theirs)) == expected


@pytest.mark.parametrize("seed", range(3))
def test_random_swaps_are_near_all_swaps(seed, monkeypatch):
    counts, others = map(to_counts, two_rows(seed, n=14))
    found = over_images.swap_p_value(counts, others)
    assert found == over_images.swap_p_value(counts, others)
    monkeypatch.setattr(over_images, "NUM_DRAWS", 2**14)
    expected = over_images.swap_p_value(counts, others)
    assert found != expected  # they were random
    assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 10_000)


def test_the_smallest_p_value_counts_the_observed_difference():
    counts, others = map(to_counts, two_rows(0, n=60, accuracies=(0.4, 0.8)))
    assert over_images.swap_p_value(counts, others) == 1 / 10_001


@pytest.mark.parametrize(("n", "num_draws"), [(7, 128), (14, 127)])
def test_p_values_are_uniform_if_the_rows_predict_equally_well(n, num_draws, monkeypatch):
    monkeypatch.setattr(over_images, "NUM_DRAWS", num_draws)  # all swaps, or random ones
    p_values = []
    for seed in range(500):
        counts, others = map(to_counts, two_rows(seed, n, accuracies=(0.7, 0.7)))
        p_values.append(over_images.swap_p_value(counts, others))
    for level in (0.0625, 0.125, 0.25, 0.5, 0.75):
        share = np.mean(np.array(p_values) <= level)
        assert abs(share - level) < 4 * np.sqrt(level * (1 - level) / 500)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_interval_is_scipys_bootstrap(num_seeds):
    ours, theirs = two_rows(5, n=25, num_seeds=num_seeds)
    expected = scipy.stats.bootstrap(
        (np.arange(25),),
        lambda i: split_score(ours[i]) - split_score(theirs[i]),
        n_resamples=2000,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    found = over_images.difference_interval(to_counts(ours), to_counts(theirs))
    np.testing.assert_allclose(
        found, expected.confidence_interval, atol=0.3 * expected.standard_error
    )


def test_the_interval_holds_the_true_difference_19_times_in_20(monkeypatch):
    monkeypatch.setattr(over_images, "NUM_DRAWS", 500)
    num_covered = 0
    for seed in range(300):
        counts, others = map(to_counts, two_rows(seed, n=50, accuracies=(0.7, 0.7)))
        low, high = over_images.difference_interval(counts, others)
        num_covered += low <= 0 <= high
    assert 0.91 < num_covered / 300 < 0.985


def test_a_difference_has_a_sign_and_its_p_value_has_none():
    for n in (8, 20):
        counts, others = map(to_counts, two_rows(n, n))
        p_value = over_images.swap_p_value(counts, others)
        assert p_value == over_images.swap_p_value(others, counts) < 1
        low, high = over_images.difference_interval(counts, others)
        np.testing.assert_allclose(
            over_images.difference_interval(others, counts), (-high, -low), atol=1e-12
        )


@pytest.mark.parametrize("n", [2, 20])
def test_equal_predictions_do_not_differ(n):
    counts, _ = map(to_counts, two_rows(0, n))
    assert over_images.swap_p_value(counts, counts) == 1
    assert over_images.difference_interval(counts, counts) == (0, 0)


# The report


def test_rows_are_compared_by_the_score_of_the_table(tmp_path):
    _, kept = add_rows(tmp_path, a=0.6, b=0.8, c=0.59)
    tests, rows = image_tests(tmp_path), {row.name: row for row in build(tmp_path, "test").rows}
    assert tests["a"] is None  # the baseline
    sides = {
        loss: to_counts(np.stack([kept[f"{loss}-{seed}"] for seed in (0, 1)], axis=1))
        for loss in "abc"
    }
    scores = {loss: row.score("eval/mean_iou")[0] for loss, row in rows.items()}
    raw = [over_images.swap_p_value(sides[loss], sides["a"]) for loss in "bc"]
    for loss, p_value in zip("bc", statistics.holm(raw), strict=True):
        test = tests[loss]
        assert (test.num_images, test.num_seeds, test.refusal) == (16, 2, "")
        assert test.difference == pytest.approx(scores[loss] - scores["a"], abs=1e-12)
        assert test.low < test.difference < test.high
        assert test.p_value == p_value
    assert tests["b"].p_value < 0.05 < tests["c"].p_value

    around = image_tests(tmp_path, baseline="loss=b")["a"]
    assert around.difference == -tests["b"].difference


def test_the_order_of_the_images_does_not_matter(tmp_path):
    names, kept = add_rows(tmp_path, a=0.7, b=0.75)
    before = image_tests(tmp_path)["b"]
    for i, (name, matrices) in enumerate(kept.items()):
        order = np.random.default_rng(i).permutation(len(names))
        write_evaluation(tmp_path / name, names[order], matrices[order])
    assert image_tests(tmp_path)["b"] == before


def test_one_seed_is_enough_and_only_shared_seeds_count(tmp_path):
    add_rows(tmp_path, seeds=[0], a=0.6, b=0.8)
    test = image_tests(tmp_path)["b"]
    assert (test.num_seeds, test.p_value < 0.05) == (1, True)

    config = tmp_path / "b-0" / "config.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 5'))
    assert image_tests(tmp_path)["b"].refusal == "no seed is also one of the baseline"


def other_names(folder, names, matrices):
    write_evaluation(folder, np.char.add(names, "x"), matrices)


def other_labels(folder, names, matrices):
    write_evaluation(folder, names, matrices[::-1])  # the same pixels, in other images


def no_file(folder, names, matrices):
    (folder / "evaluation_test.npz").unlink()


def damaged_file(folder, names, matrices):
    (folder / "evaluation_test.npz").write_bytes(b"PK")


def file_of_another_evaluation(folder, names, matrices):
    np.savez(folder / "evaluation_test.npz", names=names, confusion_matrices=matrices + 1)


LOST = "evaluation_test.npz of b-1 is missing or does not match evaluation_test.json"


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (no_file, LOST),
        (damaged_file, LOST),
        (file_of_another_evaluation, LOST),
        (other_names, "b-1 was evaluated on images of other names than a-0"),
        (other_labels, "b-1 was evaluated with other labels than a-0"),
    ],
)
def test_rows_that_are_not_of_the_same_images_are_left_out_and_named(tmp_path, change, refusal):
    names, kept = add_rows(tmp_path, a=0.6, b=0.7, c=0.8)
    alone = image_tests(tmp_path)["c"]
    change(tmp_path / "b-1", names, kept["b-1"])
    report = build(tmp_path, "test")
    _, b, c = (row.image_test for row in report.rows)
    assert b.refusal == refusal
    assert np.isnan([b.difference, b.low, b.high, b.p_value]).all()
    assert (c.difference, c.refusal) == (alone.difference, "")
    assert len(report.rows[1].runs) == 2  # it is still scored
    markdown = tables.to_markdown(report).replace("\\", "")
    assert "| b | – | – | – | – | – |" in markdown and f"- **b: {refusal}**" in markdown
    assert f"<li>b: {refusal}</li>" in page.to_html("x", report)
    assert tables.sections(report)["images"].missing == [f"b: {refusal}"]
    b, c = csv.DictReader(io.StringIO(tables.to_csv(tables.image_table(report))))
    assert (b["difference"], b["p_value"]) == ("", "") and float(c["difference"]) > 0


def test_a_single_image_or_no_pixel_is_no_test(tmp_path):
    add_rows(tmp_path / "one", n=1, a=0.6, b=0.7)
    assert image_tests(tmp_path / "one")["b"].refusal == "a single image cannot be tested"
    names, kept = add_rows(tmp_path / "none", a=0.6, b=0.7)
    for name, matrices in kept.items():
        write_evaluation(tmp_path / "none" / name, names, 0 * matrices)
    assert image_tests(tmp_path / "none")["b"].refusal == "no image has a valid pixel"


def test_rows_scored_on_other_data_are_not_compared(tmp_path):
    names, kept = add_rows(tmp_path, a=0.6, b=0.7)
    for seed in (0, 1):
        folder = tmp_path / f"b-{seed}"
        write_evaluation(folder, names, kept[folder.name], dataset_fingerprint="c" * 64)
    with pytest.raises(ValueError, match="evaluated data"):
        build(tmp_path, "test")
    assert set(image_tests(tmp_path, mixed=True).values()) == {None}


def test_all_formats_show_the_tests(tmp_path):
    add_rows(tmp_path, a=0.8, b=0.6, c=0.79)
    paths = {path.name: path for path in write(tmp_path, split="test")}
    b, c = (test for test in image_tests(tmp_path).values() if test)
    rows = list(csv.DictReader(io.StringIO(paths["report_images.csv"].read_text())))
    for test, row in zip((b, c), rows, strict=True):
        expected = (test.difference, test.low, test.high, test.p_value)
        assert tuple(float(row[k]) for k in ("difference", "low", "high", "p_value")) == expected
        assert (row["num_images"], row["num_seeds"]) == ("16", "2")
    shown = f"{b.difference:.3f}".replace("-", "−")
    markdown = paths["report.md"].read_text()
    assert "## Tests over images" in markdown and f"| b | {shown} | " in markdown
    assert rf"{b.p_value:.4f}\* |" in markdown and f"{c.p_value:.4f} |" in markdown
    assert f"<td>{shown}</td>" in paths["report.html"].read_text()
    latex = paths["report_images.tex"].read_text()
    assert f"b & {shown.replace('−', '$-$')} & " in latex and "−" not in latex
    for text in (markdown, paths["report.html"].read_text(), latex):
        assert "does not say whether it would hold for networks trained with other seeds" in text


def test_without_a_split_there_is_no_test_and_the_report_says_how(tmp_path):
    add_rows(tmp_path, a=0.6, b=0.7)
    report = build(tmp_path)
    assert {row.image_test for row in report.rows} == {None}
    for text in (tables.to_markdown(report), page.to_html("x", report)):
        assert "Tests over images" not in text
        assert "Differences are also tested over images with --split=SPLIT." in text


def add_fold_rows(root, seeds=(0, 1), **accuracies):
    """Evaluated runs on 3 folds. Returns {loss: matrices [n, s, c, c]} of all images."""
    random = np.random.default_rng(0)
    labels = draw_labels(random, 12)
    kept = {loss: np.zeros((12, len(seeds), 3, 3), int) for loss in accuracies}
    for loss, accuracy in accuracies.items():
        for seed, k in itertools.product(seeds, range(3)):
            folder, part = root / f"{loss}-{seed}-{k}", slice(4 * k, 4 * k + 4)
            files = {"dataset": DATASET | {"class_names": CLASSES}}
            add(root, folder.name, files=files, loss=loss, seed=seed, data={"folds": 3, "fold": k})
            kept[loss][part, seed] = draw_matrices(random, labels[part], accuracy)
            names = np.array([f"image{i:02d}" for i in range(12)])[part]
            write_evaluation(folder, names, kept[loss][part, seed], split="fold")
            for ending in ("json", "npz"):
                path = folder / f"evaluation_test.{ending}"
                path.rename(folder / f"evaluation_fold.{ending}")
    return kept


def test_the_images_of_all_folds_are_compared_together(tmp_path):
    kept = add_fold_rows(tmp_path, dice=0.7, focal=0.75)
    (test,) = [row.image_test for row in build(tmp_path, "fold").rows if row.image_test]
    assert (test.num_images, test.num_seeds, test.refusal) == (12, 2, "")
    difference = split_score(kept["focal"]) - split_score(kept["dice"])
    np.testing.assert_allclose(test.difference, difference, rtol=1e-9)
    expected = over_images.swap_p_value(to_counts(kept["focal"]), to_counts(kept["dice"]))
    np.testing.assert_allclose(test.p_value, expected, rtol=1e-9)


def test_folds_that_cannot_be_read_are_named(tmp_path):
    add_fold_rows(tmp_path, dice=0.7, focal=0.75)
    (tmp_path / "dice-0-1" / "evaluation_fold.npz").unlink()
    (test,) = [row.image_test for row in build(tmp_path, "fold").rows if row.image_test]
    assert test.refusal.startswith("evaluation_fold.npz of dice-0-1 is missing")
