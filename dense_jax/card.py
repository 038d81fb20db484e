"""A card: a trained network as a folder for a model hub, which is a workdir for `load` and `predict`.

README.md                    what it segments, how to use it, its scores, origin and license
config.json, dataset.json, environment.json, result.json, experiment.py, learning_curve.png
                             those of the run; environment.json also has the license
checkpoints/best/STEP        the weights, without the optimizer's state
evaluation_SPLIT.json, .png  the scores of these weights, and the worst images
model.zip                    the same network, for use without this package

Of the path of the data, config.json and the evaluations keep the last part only.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from dense_jax import storage, trained
from dense_jax.data import folds
from dense_jax.evaluation import tables
from dense_jax.spelling import decimal
from dense_jax.workdir import files
from dense_jax.workdir.checkpoint import Checkpoints

COPIED = ("dataset.json", "result.json", "experiment.py", "learning_curve.png")
# The hub knows these licenses by name, and takes others as `license_name` only.
HUB_LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "cc0-1.0", "cc-by-4.0"),
    *("cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
)


def write(
    directory: str,
    output: epath.PathLike,
    checkpoint: str = "best",
    *,
    license: str | None = None,
    export: Callable[[str, epath.Path], Mapping[str, Any]],
) -> None:
    """Writes the card of a workdir to the folder `output`.

    license: The license of the weights, if it is stated.
    export: Exports a workdir to a file, and returns the content of model.json.

    Raises ValueError, before anything is written, if `output` exists and is not an empty folder, if
    the run is not finished, or if the checkpoint does not exist or has no evaluation.
    """
    path, card = epath.Path(directory), epath.Path(output)
    if card.exists() and not (card.is_dir() and not any(card.iterdir())):
        raise ValueError(f"{card} exists: remove it, or pass another --output")
    network = trained.load(path, checkpoint)
    if not (path / "result.json").exists():
        raise ValueError(
            f"{path} is not finished: let the command that trains there end, or export without "
            "--card"
        )
    read = {file: files.read_json(file) for file in sorted(path.glob("evaluation_*.json"))}
    evaluations = {file: scores for file, scores in read.items() if scores["step"] == network.step}
    if not evaluations:
        raise ValueError(
            f"{path} has no evaluation of step {network.step}: run python -m dense_jax.evaluate "
            f"--workdir={path} --checkpoint={checkpoint} --split=test"
        )
    scored = [(scores, file.with_suffix(".md").read_text()) for file, scores in evaluations.items()]
    card.mkdir(parents=True, exist_ok=True)
    copied = [*(path / name for name in COPIED), *(f.with_suffix(".png") for f in evaluations)]
    for file in copied:
        if file.exists():
            shutil.copyfile(file, card / file.name)
    config = network.config.to_dict()
    config["data"]["root"] = epath.Path(config["data"]["root"]).name
    storage.write_json(card / "config.json", config)
    for file, scores in evaluations.items():
        storage.write_json(card / file.name, scores | {"root": epath.Path(scores["root"]).name})
    environment = files.read(path, "environment.json") | {"license": license}
    storage.write_json(card / "environment.json", environment)
    checkpoints = Checkpoints(card / "checkpoints" / "best")
    variables = network.variables
    checkpoints.save(network.step, {"ema": variables} if network.config.ema_decay else variables)
    checkpoints.close()
    about = export(str(card), card / "model.zip")
    text = _readme(card.resolve().name, about, files.read(card, "result.json"), scored)
    storage.write_text(card / "README.md", text)


def _readme(
    name: str,
    about: Mapping[str, Any],
    result: Mapping[str, Any],
    evaluations: Sequence[tuple[Mapping[str, Any], str]],
) -> str:
    """Returns the content of README.md.

    about: The content of model.json.
    evaluations: The contents of evaluation_SPLIT.json and .md, for every split.
    """
    config, dataset, trained_with = about["config"], about["dataset"], about["trained_with"]
    data, model = config["data"], config["model"]
    metadata = ["library_name: dense_jax", "pipeline_tag: image-segmentation", "tags: [jax]"]
    if license := trained_with["license"]:
        slug = re.sub("[^a-z0-9.]+", "-", license.lower()).strip("-")
        known = slug in HUB_LICENSES
        metadata += [f"license: {slug}"] if known else ["license: other", f"license_name: {slug}"]
    images = data["root"] if data["name"] == "folder" else data["name"]
    kind = "regions" if dataset["regions"] else "classes"
    names = list(dataset["regions"] or dataset["class_names"])
    sections = [
        f"## Scores on {scores['split']}\n\n{_below_title(page)}\n\n"
        f"The worst images:\n\n![Input, truth, prediction, errors](evaluation_{scores['split']}.png)"
        for scores, page in evaluations
    ]
    validation = ", ".join(
        f"{'no score' if iou is None else decimal(iou)} after step {result[which]['step']} ({which})"
        for which in ("best", "final")
        for iou in [result[which]["eval/mean_iou"]]
    )
    facts = {
        "network": f"{model['name']}, encoder {model['encoder']}, upsampling {model['upsampling']}, "
        f"{result['num_parameters']:,} parameters",
        "images": f"{dataset['num_channels']} channels, {dataset['dtype']}, normalization "
        f"{about['normalization']}, resolution {about['resolution']}",
        "data": f"{images}, {dataset['num_examples']} images of {data['train_split']}, "
        f"fingerprint {dataset['fingerprint'] or 'none'}",
        **{
            f"fingerprint of {scores['split']}": scores["dataset_fingerprint"] or "none"
            for scores, _ in evaluations
        },
        "loss": config["loss"],
        "steps": f"{config['num_steps']} of {config['batch_size']} images, seed {config['seed']}; "
        f"these weights are of step {about['step']}",
        f"mean IoU on {folds.eval_split(data)} in training": validation,
        "versions": f"commit {trained_with['git_commit'] or 'not known'}, Python "
        f"{trained_with['python']}, jax {trained_with['versions']['jax']}",
        "devices": f"{trained_with['num_devices']} x {trained_with['device_kind']}",
    }
    if origin := trained_with.get("initial_weights"):
        license_of_origin = origin["license"] or "not known"
        facts["began with"] = f"{origin['source']} (license: {license_of_origin})"
    rows = [["", ""], *([fact, tables.escape(text)] for fact, text in facts.items())]
    return "\n\n".join(
        [
            "---\n" + "\n".join(metadata) + "\n---",
            f"# {name}",
            f"Segments images into {len(names)} {kind}: {', '.join(map(tables.escape, names))}.",
            USE.replace(*USE_WITH_REGIONS) if dataset["regions"] else USE,
            *sections,
            "## Training",
            f"```bash\n{trained_with['command']}\n```",
            tables.markdown_table(rows, num_names=2),
            "![Learning curve](learning_curve.png)",
            f"## License\n\n{tables.escape(about['license'])}\n",
        ]
    )


def _below_title(page: str) -> str:
    """Returns evaluation_SPLIT.md without its title, which has the path of the data."""
    return page.partition("\n")[2].strip()


USE_WITH_REGIONS = (
    'classes = predictor("photo.jpg")  # uint8 [h, w], indices of predictor.class_names',
    'masks = predictor("photo.jpg")  # uint8 [h, w, r], 1 in a region of predictor.regions.names',
)
USE = """\
## Use

With the package dense_jax. OWNER/NAME is this repository; the path of a downloaded copy will do, too.

```python
from dense_jax import load

predictor = load("hf://OWNER/NAME")
classes = predictor("photo.jpg")  # uint8 [h, w], indices of predictor.class_names
```

```bash
python -m dense_jax.predict --workdir=hf://OWNER/NAME --images='photos/*.jpg' --output=masks
```

`model.zip` is the same network as StableHLO with its weights, which JAX runs without the package."""
