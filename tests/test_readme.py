"""Tests that the README's commands run as written, with small models and few steps."""

import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from dense_jax import plan
from tests import forked
from tests.conftest import REPOSITORY

# What the commands import.
PRELOAD = ("dense_jax.train", "dense_jax.inference.predictor", "dense_jax.report.rows")
SMALL = [
    *("--config.num_steps=2", "--config.model.widths=(2,2,2,2)"),
    "--config.model.convs_per_level=1",
    *("--config.data.crop_size=(16,16)", "--config.eval.num_pictures=1"),
]


def commands() -> list[list[str]]:
    """The arguments of every `python -m dense_jax...` in the README, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    lines = [part.strip() for block in blocks for part in re.split(r"&&|\n", block)]
    return [shlex.split(line)[2:] for line in lines if line.startswith("python -m dense_jax")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "photos" / "a.jpg")
    choices = plan.Choice("data.name", "folder"), plan.Choice("data.root", str(tiny_folder))
    (folder / "planned.py").write_text(plan.experiment_text(choices, "What `plan` would write."))
    return folder


def test_the_readme_has_every_command():
    modules = {command[0] for command in commands()}
    names = ("main", "evaluate", "predict", "demo", "export", "sweep", "report", "summary")
    names += ("data.doctor", "data.prepare", "plan")
    assert modules == {f"dense_jax.{name}" for name in names}


def test_the_table_of_scaling_is_what_its_program_prints():
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert printed in page


# Downloads are for a person to start.
RUN = [command for command in commands() if "oxford_iiit_pet" not in " ".join(command)]


@pytest.fixture(scope="module")
def ends(folder, tiny_folder):
    """Runs the commands in the README's order: later ones use what earlier ones made."""
    run = {" ".join(command): adapted(command, folder, tiny_folder) for command in RUN}
    seeds = {name: run.pop(name) for name in list(run) if "num_seeds=4" in name}
    return forked.run_all(seeds, *PRELOAD, JAX_NUM_CPU_DEVICES="4") | forked.run_all(
        run, *PRELOAD, JAX_NUM_CPU_DEVICES="1"
    )


def adapted(command, folder, tiny_folder):
    """Returns the command with the folders of this test, small models and few steps."""
    module, *arguments = [
        re.sub(r"\bROOT\b", str(tiny_folder), argument)
        .replace("=runs/", f"={folder}/runs/")
        .replace("=photos/", f"={folder}/photos/")
        .replace("=masks", f"={folder}/masks")
        .replace("=unet_dice.zip", f"={folder}/unet_dice.zip")
        .replace("=RECORDS", f"={folder}/records")
        .replace("=planned.py", f"={folder}/planned.py")
        for argument in command
    ]
    if module == "dense_jax.main" or "--num_classes=6" in arguments:
        arguments += SMALL
    if module == "dense_jax.sweep":
        arguments.append("--list")  # 36 runs
    if module == "dense_jax.plan":
        arguments.append("--help")  # trials take minutes; test_plan has them
    if module == "dense_jax.demo":
        arguments.append("--only_check_args")  # it would go on until it is stopped
    if module == "dense_jax.report":
        # The runs trained here are on more than one dataset.
        arguments = [f"--workdir={folder}/runs", "--mixed"]
    return [module, *arguments]


@pytest.mark.parametrize("command", RUN, ids=" ".join)
def test_commands_run_as_written(command, ends):
    end = ends[" ".join(command)]
    assert end.code == 0, end.err[-3000:]
