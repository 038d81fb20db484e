"""Tests that all experiments have the options of `base` and build, wherever they are imported."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from dense_jax import command, config, models
from dense_jax.program import assemble
from dense_jax.sweep import plan, tuning
from dense_jax.training import task
from dense_jax.workdir import files as workdir
from experiments import base, unet_ce, unet_dice
from tests.conftest import REPOSITORY

PATHS = sorted((REPOSITORY / "experiments").glob("[!_]*.py"))
MODULES = {path.stem: command.experiment(str(path)) for path in PATHS}
SWEEPS = {
    name: module.get_sweep() for name, module in MODULES.items() if hasattr(module, "get_sweep")
}
# Their training steps are those of unet_ce, ablation, camvid_unet and segnet_basic, but for sizes.
SAME_STEP = [
    *("base", "ablation:full", "camvid_unet:full", "camvid_segnet_table:full"),
    *("camvid_upsampling", "camvid_skips", "ce_plus_dice"),
]
# Some sweeps have the config of another file.
CONFIGS = [
    name
    for name, module in MODULES.items()
    if module.get_config.__module__ == "experiment" and name not in SAME_STEP
]


def config_of(name: str, override: dict | None = None):
    """Returns an experiment's config with the changes of a run, for a dataset that is somewhere."""
    stem, *size = name.split(":")
    loaded = MODULES[stem].get_config(*size)
    with loaded.ignore_type():
        loaded.update_from_flattened_dict(override or {})
    loaded.data.root = "anywhere"
    return loaded


@pytest.mark.parametrize("name", SAME_STEP)
def test_a_larger_size_builds(name):
    config.check(config_of(name))
    num_parameters(config_of(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_experiment_builds(name):
    loaded = config_of(name)
    loaded.batch_size = max(loaded.batch_size, jax.device_count())  # one image per device
    config.check(loaded)
    fields = task.target_fields(loaded, num_classes=4)
    program = assemble(loaded, num_classes=4)
    training = task.bind(loaded, program, num_channels=3, fields=fields)
    state = training.shapes()
    batch = task.batch_shapes(loaded, loaded.data.crop_size, 3, fields)
    new_state, metrics = jax.eval_shape(training.train_step, state, batch, jax.random.key(0))
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert metrics["train/loss"].shape == ()


def test_the_sweeps_have_as_many_runs_as_they_say():
    for name, runs in SWEEPS.items():
        assert re.findall(r"(\d+) runs", MODULES[name].__doc__)[0] == str(len(runs)), name
        assert max(map(len, plan.run_names(runs))) < 80


def num_parameters(loaded) -> int:
    """Returns the number of parameters of the model for RGB and 11 classes, by tracing it."""
    model = models.build(loaded.model, num_classes=11)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    logits, variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=True), image
    )
    assert logits.shape == (1, 32, 32, 11)
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


def test_every_run_of_every_sweep_builds():
    for name, runs in SWEEPS.items():
        known = [run.override for run in tuning.expand(runs) if not run.trials]
        for override in {str(run | {"seed": 0}): run for run in known}.values():
            loaded = config_of(name, override)
            config.check(loaded)
            models.build(loaded.model, num_classes=4)


def test_segnets_decoders_have_about_the_parameters_of_its_table():
    table = MODULES["camvid_segnet_table"]
    for label, fields in table.VARIANTS.items():
        millions = num_parameters(config_of("camvid_segnet_table:full", fields)) / 1e6
        ((published, ours),) = re.findall(rf"\n +{label} +([\d.]+) +([\d.]+)\n", table.__doc__)
        assert round(millions, 3) == float(ours)
        assert millions == pytest.approx(float(published), rel=0.025)


def test_flags_say_the_same_as_the_overrides():
    """The command line has class weights by name, tuples and a label."""
    override = next(run for run in SWEEPS["camvid_segnet_table"] if run["label"] == "FCN-Basic")
    loaded, values = command.load_config("camvid_segnet_table"), flags.FlagValues()
    argv = ["command", *plan.as_flags(override)]
    config_flags.DEFINE_config_dict("config", loaded, flag_values=values, sys_argv=argv)
    values(argv)
    assert override.items() <= workdir.flatten(loaded.to_dict()).items()


@pytest.mark.parametrize("name", MODULES)
def test_every_experiment_has_the_options_of_base_and_tells_its_command(name):
    fields = workdir.flatten(MODULES[name].get_config().to_dict())
    assert fields.keys() == workdir.flatten(base.get_config().to_dict()).keys()
    assert name == "base" or f"--config=experiments/{name}.py" in MODULES[name].__doc__


def test_sizes_are_reduced_and_full():
    for name in ("ablation", "ablation_loss", "camvid_unet", "camvid_segnet_table"):
        reduced = command.load_config(f"{name}:reduced")
        assert reduced == command.load_config(name) != command.load_config(f"{name}:full")
        with pytest.raises(ValueError, match="the size 'small' must be reduced or full"):
            command.load_config(f"{name}:small")


def test_every_option_is_used():
    """An experiment sets it, or a page or benchmark says what it is good for."""
    default = workdir.flatten(base.get_config().to_dict())
    used = {
        "eval.margin",
        "eval.num_images",
        "eval.num_pictures",
    }  # of the evaluation, not of an experiment
    for name, module in MODULES.items():
        configs = [workdir.flatten(module.get_config().to_dict()), *SWEEPS.get(name, [])]
        used |= {path for fields in configs for path in fields if fields[path] != default[path]}
    pages = [
        REPOSITORY / "README.md",
        *REPOSITORY.glob("docs/*.md"),
        *REPOSITORY.glob("benchmarks/*"),
    ]
    text = "\n".join(p.read_text() for p in pages if p.is_file() and p.stem != "configuration")
    text += "\n".join(path.read_text() for path in PATHS if path.stem != "base")
    unused = [path for path in default.keys() - used if not re.search(rf"\b{path}\b", text)]
    assert not unused


OWN = """
import sys
from experiments import base, unet_dice
assert base.MINE and not hasattr(unet_dice, "get_config")
from dense_jax import command
print(command.load_config("unet_dice").loss, command.load_config("experiments/mine.py").loss)
"""


def test_a_project_may_have_experiments_of_its_own(tmp_path):
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "base.py").write_text("MINE = True")
    (folder / "unet_dice.py").touch()
    (folder / "mine.py").write_text(
        "from experiments import base\nfrom dense_jax.experiments import unet_ce\n"
        "assert base.MINE\nget_config = unet_ce.get_config"
    )
    done = subprocess.run(
        [sys.executable, "-c", OWN],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "soft_dice cross_entropy\n"


def test_the_package_has_the_experiments():
    """A wheel gets them by this link, as setuptools follows it."""
    for path in PATHS:
        assert path.samefile(command.EXPERIMENTS / path.name)
    setuptools = pytest.importorskip("setuptools")  # Python 3.12 environments have none
    assert "dense_jax.experiments" in setuptools.find_packages(REPOSITORY, include=["dense_jax*"])


def test_dice_and_cross_entropy_differ_in_the_loss_alone():
    ce = workdir.flatten(unet_ce.get_config().to_dict())
    dice = workdir.flatten(unet_dice.get_config().to_dict())
    assert {field for field in ce if ce[field] != dice[field]} == {"loss"}


@pytest.mark.parametrize("field", ["saturation", "hue"])
def test_what_needs_rgb_is_refused_on_gray_before_anything_is_computed(field):
    loaded = base.get_config()
    loaded.augment[field] = 0.5
    batch = task.batch_shapes(loaded, loaded.data.crop_size, num_channels=1)
    training = task.bind(loaded, assemble(loaded, num_classes=2), num_channels=1)
    with pytest.raises(ValueError, match=f"augment.{field}=0.5 needs images of 3 channels"):
        jax.eval_shape(training.train_step, training.shapes(), batch, jax.random.key(0))
