"""Creates run folders like the ones from training and evaluation, without running either."""

import json

import numpy as np
from PIL import Image

from dense_jax import class_colors, data
from dense_jax.evaluation import class_maps, per_image
from dense_jax.metrics import boundary
from dense_jax.report import tables

NASTY = '<img src=x onerror="document.title=1">&amp;$x_1$'


def write_dataset(root, num_images=5, size=(20, 24), classes=("dark", NASTY)):
    """Images of several sizes, the first of nearly 3000 pixels, with an ignored line in each."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / kind / "test").mkdir(parents=True)
    for i in range(num_images):
        h, w = (12, 2940) if i == 0 else (size[0] + i, size[1])
        label = np.indices((h, w))[1] * len(classes) // w
        image = 40 + 120 * label + rng.integers(-20, 20, (h, w))
        label[0] = 9
        for kind, pixels in (("images", image), ("labels", label)):
            name = f"<b>{i}&.png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / kind / "test" / name)
    options = {"classes": list(classes), "ignored_values": [9]}
    (root / "dataset.json").write_text(json.dumps(options))


def write_runs(root, dataset, losses=("dice", NASTY), upsamplings=("nearest",), seeds=(0, 1)):
    """Runs whose predictions are the labels, but for a part of the pixels that differs."""
    source = data.open_dataset("folder", str(dataset), "test")
    c = source.num_classes
    cells = [(a, b, seed) for a in losses for b in upsamplings for seed in seeds]
    for k, (loss, upsampling, seed) in enumerate(cells):
        folder = root / f"run{k:02d}"
        folder.mkdir(parents=True)
        config = {"seed": seed, "loss": loss, "num_steps": 20, "model": {"upsampling": upsampling}}
        (folder / "config.json").write_text(json.dumps(config))
        rng = np.random.default_rng(k)
        matrices, phases = [], []
        palette = class_colors.palette_of(source)
        with class_maps.writing(folder / "evaluation_test.zip", source.names, palette) as write:
            for i, example in enumerate(source):
                label = example["label"].astype(np.uint8)
                wrong = rng.random(label.shape) < 0.05 * (k + 1) + 0.05 * ((i + k) % 3)
                guess = np.where(wrong, rng.integers(0, c, label.shape), label % c).astype(np.uint8)
                write(i, guess)
                valid = label < c
                pairs = c * label[valid].astype(int) + guess[valid]
                matrices.append(np.bincount(pairs, minlength=c * c).reshape(c, c))
                phases.append(per_image.phase_errors(guess, label))
        np.savez(
            folder / "evaluation_test.npz",
            names=np.array(source.names),
            confusion_matrices=matrices,
            phase_errors=phases,
        )
        score = 0.9 - 0.05 * k
        scores = {"eval/mean_iou": score, "eval/mean_dice": score, "eval/pixel_accuracy": score}
        scores |= {f"eval/iou/{name}": score - 0.1 * j for j, name in enumerate(source.class_names)}
        evaluation = {"eval/mean_boundary_f1": score - 0.1, **scores}
        evaluation |= {f"eval/trimap_mean_iou/{w}": score - 0.1 / w for w in boundary.BAND_WIDTHS}
        evaluation |= {
            "dataset": "folder",
            "root": str(dataset),
            "split": "test",
            "class_names": source.class_names,
            "confusion_matrix": np.sum(matrices, axis=0).tolist(),
        }
        (folder / "evaluation_test.json").write_text(json.dumps(evaluation))
        (folder / "dataset.json").write_text(json.dumps({"palette": palette.tolist()}))
        result = {"status": "finished", "num_parameters": 1000, "final": {"step": 20, **scores}}
        (folder / "cost.json").write_text(json.dumps({"flops_per_image": 1e9 * (k + 1)}))
        (folder / "result.json").write_text(json.dumps(result))
        lines = [{"step": s, "eval/mean_iou": score * s / 20} for s in (5, 10, 20)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def score_csv(report):
    """Returns report.csv."""
    return tables.to_csv(tables.score_table(report))


def cost_csv(report):
    """Returns report_cost.csv."""
    return tables.to_csv(tables.cost_table(report))
