"""Tests that user mistakes end every command with one clear line, and how flags are parsed."""

import re

import pytest
from absl import flags

from dense_jax import __version__, command
from dense_jax.workdir import files
from tests import forked
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "dense_jax"
PATHS = [path for path in PACKAGE.rglob("*.py") if "command.run(" in path.read_text()]
COMPUTING = {"main", "evaluate", "predict", "export", "demo", "summary"}


def test_every_command_is_run_alike():
    names = COMPUTING | {"__main__", "convert", "doctor", "plan", "prepare"}
    assert {path.stem for path in PATHS} == names
    for path in PACKAGE.rglob("*.py"):
        assert "app.run(" not in path.read_text() or path.stem == "command", path
    for path in PATHS:
        prepares = re.search(r"(startup|runtime)\.prepare\(\)", path.read_text())
        assert bool(prepares) == (path.stem in COMPUTING), path


def test_the_table_has_every_command():
    paths = {path.relative_to(PACKAGE).with_suffix("") for path in PATHS}
    names = {".".join(path.parts).removesuffix(".__main__") for path in paths}
    assert names == set(command.COMMANDS)


def test_the_changelog_begins_with_this_version_or_with_what_follows_it():
    newest, *older = re.findall(
        "^## ([^ \n]+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert __version__ == (older[0] if newest == "Unreleased" else newest)


def test_help_begins_with_an_example_and_waits_for_no_slow_import():
    """Here importing jax fails. The flags that the command requires are not needed."""
    program = (
        "import runpy, sys; sys.modules['jax'] = None; sys.argv = ['x', '--help']; "
        "runpy.run_module('dense_jax.%s', run_name='__main__', alter_sys=True)"
    )
    commands = {name: ["-c", program % name] for name in command.COMMANDS}
    ends = forked.run_all(commands, "dense_jax.data.checks")
    for name, end in ends.items():
        assert (end.code, end.err) == (0, ""), name
        assert end.out.startswith(f"Example:\n\n    python -m dense_jax.{name} --"), name
        defined = set(re.findall(r"^  --(?:\[no\])?(\w+):", end.out, re.MULTILINE))
        shown = set(re.findall(r" --(\w+)", command.COMMANDS[name].example))
        assert shown <= defined, name


def test_a_command_is_run_by_its_name_or_the_end_of_it():
    commands = {
        words: ["dense_jax", *words.split()]
        for words in (
            "",
            "--version",
            "data.doctor --help",
            "doctor --help",
            "docter",
            "xyz",
            "doctor --name=x",
        )
    }
    ends = forked.run_all(commands, "dense_jax.data.checks")
    assert ends[""].code == 0 and all(f"  {name} " in ends[""].out for name in command.COMMANDS)
    assert ends["--version"].out == f"dense_jax {__version__}\n"
    full = ends["data.doctor --help"]
    assert full == ends["doctor --help"] and full.out.startswith("Example:")
    assert ends["docter"].err == "error: no command 'docter'; did you mean 'doctor'?\n"
    assert "; there are: data.convert, data.doctor, " in ends["xyz"].err
    assert ends["doctor --name=x"].code == 1 and "flag --name=x: " in ends["doctor --name=x"].err


PROGRAM = """
from absl import flags
from dense_jax import command
command.define_folder('output', 'Results.')
def main(argv): %s
command.run(main)
"""
FULL = "raise OSError(28, 'No space left on device')"
ENDS = {  # (statement of main, arguments) -> exit status, stdout, pattern of stderr
    ("raise ValueError('seed=-1')", ""): (1, "", "error: seed=-1\n"),
    ("raise FloatingPointError('step 3')", ""): (1, "", "error: step 3\n"),
    ("open('nowhere/a')", "--output=masks"): (1, "", r"error: \[Errno 2\] .*: 'nowhere/a'\n"),
    (FULL, "--output=masks"): (1, "", "error: .* device; the command writes to --output=masks\n"),
    ("raise OSError('cannot save')", "--output=masks"): (1, "", "error: cannot save\n"),
    # Who mends the program sees where it was.
    ("raise ValueError('x')", "--verbosity=1"): (1, "", r"(?s).*Traceback.*in main.*"),
    ("raise RuntimeError('x')", ""): (1, "", r"(?s).*Traceback.*in main.*"),
    ("print(1)", "a.png b.png"): (
        *(1, ""),
        r"error: unexpected arguments: a.png b.png \(flags are --NAME=VALUE; quote globs\)\n",
    ),
    ("print(1)", "output=x"): (1, "", "error: unexpected .* did you mean 'output'.*\n"),
    ("print(1)", "--outptu=x"): (1, "", "error: .* flag 'outptu'. Did you mean: output.*\n"),
    ("print(1)", "--output="): (1, "", "error: .*--output=: must not be empty\n"),
    ("print(1)", f"--output={__file__}"): (1, "", "error: .*command.py: is a file, not a folder\n"),
    # The shell expands "~" in some places only.
    ("print(flags.FLAGS.output)", "--output=~/masks"): (0, "/home/me/masks\n", ""),
    # The terminal cannot show all letters.
    (r"print('stra\xdfe')", ""): (0, "stra\\xdfe\n", ""),
}


@pytest.fixture(scope="module")
def ended():
    commands = {key: ["-c", PROGRAM % key[0], *key[1].split()] for key in ENDS}
    return forked.run_all(
        commands, "dense_jax.command", HOME="/home/me", PYTHONIOENCODING="ascii:strict"
    )


@pytest.mark.parametrize("key", ENDS, ids=" ".join)
def test_a_command_ends_with_one_line_and_its_exit_status(key, ended):
    code, out, err = ENDS[key]
    assert (ended[key].code, ended[key].out) == (code, out)
    assert re.fullmatch(err, ended[key].err)


LINES = """
import logging
import absl.logging
from absl import app
from tqdm import tqdm
from dense_jax import command
def main(argv):
    command.show_log_lines()
    log = logging.getLogger("dense_jax")
    bar = tqdm(total=9, bar_format="bar {n_fmt}", mininterval=0)
    bar.update(3)
    log.info("a %s", "line")
    log.warning("look")
    absl.logging.info("chatter")
command.run(main)
"""


def test_log_lines_do_not_tear_the_progress_bar():
    """The bar is wiped out before a line and drawn again below it."""
    (end,) = forked.run_all({0: ["-c", LINES]}, "dense_jax.command").values()
    text = re.sub(r"\d\d-\d\d \d\d:\d\d:\d\d", "TIME", end.err)
    wiped = "\rbar 3\r     \r"
    assert text.startswith(f"\rbar 0{wiped}TIME a line\n{wiped}TIME warning: look\n\rbar 3")
    assert "chatter" not in text


BAD_VALUES = {
    "evaluate": "--batch_size=0",
    "predict": "--margin=-1 --tile_size=4,4",
    "predict ": "--tile_size=big,big",
    "data.doctor": "--picture=pic",
}


def test_a_value_that_no_command_can_use_is_a_bad_flag():
    commands = {
        module: [f"dense_jax.{module.strip()}", *words.split()]
        for module, words in BAD_VALUES.items()
    }
    ends = forked.run_all(commands, "dense_jax.trained", "dense_jax.evaluation.scoring")
    for module, end in ends.items():
        assert end.code == 1
        assert f"flag {BAD_VALUES[module].split()[0]}: " in end.err and "Traceback" not in end.err


@pytest.mark.parametrize("words", ["10", "", "8,8,8", "0,8", "-8,8", "8,x"])
def test_a_size_is_two_positive_numbers(words):
    assert command.parse_size("8,16") == (8, 16)
    with pytest.raises(ValueError, match="must be HEIGHT,WIDTH in pixels"):
        command.parse_size(words)


def test_an_experiment_is_a_file_or_a_name_of_ours(tmp_path, monkeypatch):
    ours = REPOSITORY / "experiments" / "unet_ce.py"
    monkeypatch.chdir(REPOSITORY)
    assert command.experiment_file("experiments/unet_ce.py") == "experiments/unet_ce.py"
    assert ours.samefile(command.experiment_file("unet_ce"))
    monkeypatch.chdir(tmp_path)
    assert ours.samefile(command.experiment_file("unet_ce:size"))
    assert ours.samefile(command.experiment_file("experiments/unet_ce.py:size"))
    (tmp_path / "unet_ce.py").touch()
    assert command.experiment_file("unet_ce.py") == "unet_ce.py"
    with pytest.raises(ValueError, match="did you mean 'unet_ce'"):
        command.experiment_file("experiments/unet_cee.py")
    with pytest.raises(ValueError, match="no experiment file 'other/unet_ce"):
        command.experiment_file("other/unet_ce.py")
    with pytest.raises(ValueError, match=r"did you mean 'unet_dice' or 'unet_ce\.py' or"):
        command.experiment_file("unet_ice.py")


MISTYPED = """
from experiments import base
def get_config():
    config = base.get_config()
    config.num_steps = "many"
    return config
"""


@pytest.mark.parametrize(
    ("source", "flag", "message"),
    [
        (None, "", "no experiment file '.*unet_cee.py' .*; did you mean 'experiments/unet_ce.py'"),
        ("", "", r"unet_cee.py has no get_config\(\)"),
        ("def get_config(): return 1", "", "must return a ConfigDict, got 1"),
        ("def get_config(): raise ValueError('small or large')", "", "small or large"),
        (MISTYPED, "", "get_config.* of .*unet_cee.py: .*'num_steps'"),
        (
            "from dense_jax.experiments.base import get_config",
            "--config.model.widhts=(1,)",
            "--config.model.widhts: no such field. Valid there: .*; did you mean 'widths'",
        ),
    ],
)
def test_what_is_wrong_with_an_experiment_file_is_said(
    source, flag, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    file = tmp_path / "unet_cee.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(ValueError, match=message):
        command.parse_flags(["command", "--config", str(file), flag])


@pytest.fixture
def parsed(monkeypatch):
    """Returns the config that parse_flags makes of arguments."""

    def parse(*arguments):
        values = flags.FlagValues()
        flags.DEFINE_string("config", None, "", flag_values=values)
        monkeypatch.setattr(flags, "FLAGS", values)
        command.parse_flags(["command", "--config=unet_ce", *arguments])
        return values.config

    return parse


def test_the_last_of_several_flags_wins_for_every_field(parsed):
    config = parsed(
        *("--config.model.widths=(4, 8)", "--config.seed=1", "--config.model.skips=(4, 2)"),
        *("--config.model.widths", "(16, 32)", "--config.seed=2", "--config.model.skips=()"),
        *("--config.border.classes=cell", "--config.border.classes=nucleus"),
    )
    assert (config.model.widths, config.seed, config.model.skips) == ((16, 32), 2, ())
    assert config.border.classes == ("nucleus",)


def test_paths_of_the_config_may_begin_at_home(parsed, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = ("data.root", "model.pretrained", "model.initialize_from")
    config = parsed(*(f"--config.{option}=~/{option}" for option in options))
    for option in options:
        assert files.flatten(config.to_dict())[option] == f"/home/me/{option}"
