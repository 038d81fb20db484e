"""Tests of README.md and docs/*.md: commands run or parse, code runs, links lead somewhere."""

import ast
import importlib
import itertools
import re
import shlex
import subprocess

import pytest
from PIL import Image

from dense_jax import command, config, plan
from dense_jax.losses import LOSSES
from tests import forked
from tests.conftest import REPOSITORY

# What the commands import.
PRELOAD = ("dense_jax.train", "dense_jax.inference.predictor", "dense_jax.report.rows")
SMALL = [
    *("--config.num_steps=2", "--config.model.widths=(2,2,2,2)"),
    "--config.model.convs_per_level=1",
    *("--config.data.crop_size=(16,16)", "--config.eval.num_pictures=1"),
]
TEXTS = {
    path.stem: path.read_text()
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
# The pages whose commands run, in this order: later commands use what earlier ones made. The
# commands of the other pages are parsed.
RUN_PAGES = ("README", "train", "evaluate", "predict", "export", "data", "speed", "sweeps")
# Downloads are for a person to start; ONNX files and TPU programs need packages.
NOT_RUN = ("oxford_iiit_pet", "--format=onnx", "--topology")
# Another test runs the code of export, models repeats README, train needs packages.
CODE_NOT_RUN = ("export", "models", "train")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of each command in the page's bash blocks, without variables before the command."""
    lines = "\n".join(blocks(page, "bash")).replace("&&", "\n").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[*itertools.dropwhile(re.compile(r"\w+=").match, line)] for line in words if line]


def ours(page: str) -> list[list[str]]:
    """The modules and arguments of the page's commands of dense_jax, also by way of launch/."""
    found = []
    for words in commands(page):
        if words[:2] == ["python", "-m"] and words[2].startswith("dense_jax"):
            found.append(words[2:])
        elif any(word.startswith("launch/") for word in words):
            scripts = [word.startswith("launch/") for word in words]
            flags = [word for word in words[scripts.index(True) :] if word.startswith("--")]
            found += [["dense_jax.main", *flags]] if flags else []
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    """A current folder in which the commands find the files that they name."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "experiments").symlink_to(REPOSITORY / "experiments")
    (folder / "ROOT").symlink_to(tiny_folder)
    (folder / "photos").mkdir()
    for path in ("photos/a.jpg", "photo.jpg"):
        Image.new("RGB", (40, 30)).save(folder / path)
    choices = plan.Choice("data.name", "folder"), plan.Choice("data.root", str(tiny_folder))
    for name in ("planned", "equal_time"):
        text = plan.experiment_text(choices, "Holds what a command of the pages would write.")
        (folder / f"{name}.py").write_text(text)
    return folder


def adapted(words: list[str]) -> list[str]:
    """Returns the command with small models and few steps."""
    module, *arguments = words
    name = module.removeprefix("dense_jax.")
    if name == "main":
        arguments += SMALL
    if name == "sweep":
        arguments.append("--list")  # 72 runs
    if name in ("plan", "demo"):
        arguments.append("--only_check_args")  # trials take minutes; a server would never end
    if name == "report":
        # The runs trained here are on several datasets, and no sweep.
        others = [word for word in arguments if not word.startswith(("--workdir", "--split"))]
        arguments = ["--workdir=runs", "--mixed", *others]
    return [module, *arguments]


RUN = {
    shlex.join(words): adapted(words)
    for page in RUN_PAGES
    for words in ours(page)
    if not any(text in shlex.join(words) for text in NOT_RUN)
}
PARSED = {
    shlex.join(words): [*words, "--only_check_args"]
    for page in TEXTS
    for words in ours(page)
    if shlex.join(words) not in RUN
}
CODE = {
    f"{page} {number}": ["-c", code]
    for page in TEXTS
    for number, code in enumerate(blocks(page, "python"))
    if page not in CODE_NOT_RUN
}


@pytest.fixture(scope="module")
def ends(folder):
    seeds = {name: words for name, words in RUN.items() if "num_seeds=4" in name}
    others = {name: words for name, words in (RUN | CODE).items() if name not in seeds}
    return forked.run_all(seeds, *PRELOAD, cwd=folder, JAX_NUM_CPU_DEVICES="4") | forked.run_all(
        others, *PRELOAD, cwd=folder, JAX_NUM_CPU_DEVICES="1"
    )


@pytest.mark.parametrize("name", [*RUN, *CODE])
def test_commands_and_code_run_as_written(name, ends):
    assert ends[name].code == 0, ends[name].err[-3000:]


def test_every_command_runs_or_is_parsed():
    modules = {words[0].removeprefix("dense_jax.") for words in [*RUN.values(), *PARSED.values()]}
    assert modules == set(command.COMMANDS)


def test_the_other_commands_have_the_flags_and_fields_that_they_are_given(folder):
    for name, end in forked.run_all(
        {name: [word.replace("gs://", "") for word in words] for name, words in PARSED.items()},
        *PRELOAD,
        cwd=folder,
    ).items():
        assert end.code == 0, (name, end.err[-1000:])


def test_programs_exist_and_have_the_flags_that_they_are_given():
    for words in [words for page in TEXTS for words in commands(page)]:
        for script in [word for word in words if word.startswith("launch/")]:
            assert (REPOSITORY / script).is_file(), words
        if words[:2] == ["python", "-m"] and words[2].startswith(("benchmarks", "docs")):
            program = (REPOSITORY / f"{words[2].replace('.', '/')}.py").read_text()
            for flag in [word.partition("=")[0] for word in words if word.startswith("--")]:
                assert f'"{flag}"' in program, words


def test_blocks_of_bash_are_bash():
    for page in TEXTS:
        for block in blocks(page, "bash"):
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_options_in_the_text_exist():
    for page, text in TEXTS.items():
        for path in re.findall(r"--config\.(\w[\w.]*)=", text):
            assert path in config.declared() or path == "x", (page, path)


def test_code_compiles_and_what_it_imports_from_here_exists():
    for code in [code for page in TEXTS for code in blocks(page, "python")]:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dense_jax"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.import_module(
                        f"{node.module}.{name.name}"
                    )


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_has_a_title_and_its_links_lead_to_files_and_headings(page):
    assert len(re.findall(r"^# ", prose(TEXTS[page]), re.MULTILINE)) == 1
    base = REPOSITORY if page == "README" else REPOSITORY / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[page])):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = base / path if path else base / f"{page}.md"
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), target


def test_the_contents_have_every_page():
    assert {f"({page}.md)" for page in TEXTS.keys() - {"README", "index"}} <= {
        *re.findall(r"\(\w+\.md\)", TEXTS["index"])
    }


def rows(page: str) -> list[list[str]]:
    """The rows of the page's tables, without the headings of the columns."""
    lines = re.findall(r"^\| (?!-)(.*) \|$(?!\n\| -)", TEXTS[page], re.MULTILINE)
    return [line.split(" | ") for line in lines]


def test_the_readme_is_short_and_its_tables_are_in_the_results():
    assert len(TEXTS["README"].splitlines()) <= 130
    wide = [row for row in rows("results") if len(row) == 7 and row[0] in LOSSES]
    scores = {tuple(row[:3]): row[3:] for row in wide}
    methods = {method for _, _, method in scores}
    wide = [row for row in rows("README") if len(row) == 7]
    pivot = [row for row in rows("README") if row[0] in methods]
    assert wide and {row[0] for row in pivot} == methods
    assert wide == [[*row[:3], *scores[tuple(row[:3])]] for row in wide]
    columns = [(loss, k) for loss in ("cross_entropy", "soft_dice") for k in ("none", "4, 2, 1")]
    assert pivot == [[row[0], *(scores[*c, row[0]][0] for c in columns)] for row in pivot]
