"""Code that all commands share: flags, help, experiment files, and one-line errors. No jax here.

A user's mistake (an invalid flag or option, a missing file, a full disk) ends a command with one
line, `error: ...`, and exit status 1. With --verbosity=1, the traceback is shown instead.
"""

import argparse
import functools
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import absl.logging
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser
from tqdm.contrib import DummyTqdmFile

from dense_jax import buckets
from dense_jax.spelling import suggestion

PREEMPTED = os.EX_TEMPFAIL  # exit status 75: everything is saved, the same command resumes
MISTAKES = (ValueError, OSError, FloatingPointError, SyntaxError, flags.Error)
WRITTEN_TO = ("output", "picture", "workdir")  # output flags; the first that is set is used
EXPERIMENTS = Path(__file__).parent / "experiments"


class Command(NamedTuple):
    """Describes a command, the module dense_jax.NAME.

    about: One line that continues "The command ...".
    example: The arguments of an example.
    """

    about: str
    example: str


COMMANDS = {
    "data.convert": Command(
        "converts what annotation tools export to a folder of images and labels",
        "--from=coco --annotations=result.json --images=EXPORT --output=DATA",
    ),
    "data.doctor": Command(
        "reports what a dataset contains and what is wrong with it", "--name=folder --root=DATA"
    ),
    "data.prepare": Command(
        "downloads a dataset or copies it to records, which are fast to read",
        "--name=folder --root=DATA --output=RECORDS",
    ),
    "plan": Command(
        "plans how to train on a dataset in a given time, and writes an experiment file",
        "--name=folder --root=DATA --minutes=15 --output=planned.py",
    ),
    "summary": Command(
        "shows a network's layers, and the memory and operations that training needs",
        "--config=unet_dice",
    ),
    "main": Command(
        "trains a model, or resumes its training", "--config=unet_dice --workdir=runs/unet_dice"
    ),
    "evaluate": Command(
        "scores a trained model on a split of its data", "--workdir=runs/unet_dice --split=test"
    ),
    "predict": Command(
        "segments image files", "--workdir=runs/unet_dice --images='photos/*.jpg' --output=masks"
    ),
    "demo": Command("segments images on a web page", "--workdir=runs/unet_dice"),
    "export": Command(
        "writes a trained model to one file", "--workdir=runs/unet_dice --output=unet_dice.zip"
    ),
    "sweep": Command(
        "trains all variants of an experiment", "--config=ablation --workdir=runs/ablation"
    ),
    "report": Command("compares runs in tables and figures", "--workdir=runs/ablation"),
}

flags.disclaim_key_flags()  # lists the flags defined here in the calling command's --help


def run(main: Callable[[list[str]], Any], *, flags_parser: Callable | None = None) -> None:
    """Parses the flags and calls main(argv). Shows a user's mistake as a one-line error."""
    help_if_asked()
    # The terminal's encoding may lack characters of a class name.
    sys.stdout.reconfigure(errors="backslashreplace")  # pyrefly: ignore
    try:
        app.run(main, flags_parser=flags_parser or parse)
    except MISTAKES as error:
        if any(re.fullmatch("--?v(erbosity)?=[1-9]", word) for word in sys.argv):
            raise
        sys.exit(f"error: {_text(error)}")


def help_if_asked() -> None:
    """Prints the running command's help and exits with status 0 if --help is an argument.

    A command calls this function above its slow imports, and defines its flags before.
    """
    if not {"--help", "-help", "-h"}.intersection(sys.argv[1:]):
        return
    main = sys.modules["__main__"]
    spec = main.__spec__
    name = spec.name.removeprefix("dense_jax.").removesuffix(".__main__") if spec else ""
    if name in COMMANDS:
        print(f"Example:\n\n    python -m dense_jax.{name} {COMMANDS[name].example}\n")
    print(f"{(main.__doc__ or '').strip()}\n\nFlags:\n{flags.FLAGS.main_module_help()}")
    sys.exit()


def show_log_lines() -> None:
    """Shows log lines of dense_jax at INFO and above, and of libraries at WARNING and above.

    On a terminal, lines appear above the progress bars.
    """
    absl.logging.set_verbosity(absl.logging.WARNING)  # orbax logs a lot
    logging.getLogger("dense_jax").setLevel(logging.INFO)
    handler = absl.logging.get_absl_handler()
    handler.setFormatter(_LineFormatter(datefmt="%m-%d %H:%M:%S"))
    handler.python_handler.stream = DummyTqdmFile(sys.stderr)


class _LineFormatter(logging.Formatter):
    """Formats a log record as "MONTH-DAY TIME message", or "... warning: message"."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.formatTime(record, self.datefmt)} {level}{record.message}"


def _text(error: BaseException) -> str:
    """Returns an error's message. If an OSError names no file, adds the command's output path."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        for name in WRITTEN_TO:
            if name in flags.FLAGS and (path := flags.FLAGS[name].value):
                return f"{error}; the command writes to --{name}={path}"
    return str(error)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags of a command. Raises ValueError if there are positional arguments."""
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
        near = suggestion(rest[1].partition("=")[0], flags.FLAGS)
        raise ValueError(
            f"unexpected arguments: {' '.join(rest[1:])} (flags are --NAME=VALUE; quote globs){near}"
        )
    return rest


class _Parser(flags.ArgumentParser):
    """Parses a flag's value by a function."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function

    def parse(self, argument: Any) -> Any:
        return self._function(argument)


def parse_path(argument: str, bucket: buckets.Access | None = None) -> str:
    """Parses a path and expands a "~" that the shell did not expand.

    bucket: What a path in a bucket is for, which must be possible. If None, a path must be local.
    """
    if not argument:
        raise ValueError("must not be empty")
    if buckets.is_url(argument):
        if bucket is None:
            raise ValueError("must be on a local disk, not in a bucket")
        buckets.check(argument, bucket)
    return os.path.expanduser(argument)


def parse_folder(argument: str, bucket: buckets.Access | None = None) -> str:
    """Parses the path of a folder, which need not exist. `bucket` is as in `parse_path`."""
    path = parse_path(argument, bucket)
    if os.path.isfile(path):
        raise ValueError("is a file, not a folder")
    return path


def parse_workdirs(argument: str) -> list[str]:
    """Parses the paths of workdirs or exported models, separated by commas.

    The names of a sweep's runs contain commas, so each path is the longest one that exists.
    """
    parse_path(argument, "run")  # checks the access to a bucket
    parts, paths = argument.split(","), []
    while parts:
        lengths = range(1, len(parts) + 1)
        joined = {n: os.path.expanduser(",".join(parts[:n])) for n in lengths}
        n = max((n for n in lengths if _exists(joined[n])), default=1)
        paths.append(parse_path(joined[n], "run"))
        parts = parts[n:]
    return paths


def _exists(path: str) -> bool:
    # epath would take hf:// for a folder.
    return bool(path) and not path.startswith("hf://") and epath.Path(path).exists()


def parse_size(argument: str) -> tuple[int, ...]:
    """Parses HEIGHT,WIDTH in pixels."""
    words = argument.split(",")
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError("must be HEIGHT,WIDTH in pixels, such as 224,224")
    return tuple(map(int, words))


# If a tuple flag is repeated, the last value wins. ml_collections would concatenate the values.
config_flags.register_flag_parser_for_type(tuple, _Parser(tuple_parser.TupleParser().parse))


def define_path(
    name: str, about: str, *, required: bool = False, bucket: buckets.Access | None = None
) -> None:
    """Defines a flag for the path of a file or folder. `bucket` is as in `parse_path`."""
    parser = _Parser(functools.partial(parse_path, bucket=bucket))
    flags.DEFINE(parser, name, None, about, required=required)


def define_folder(
    name: str, about: str, *, required: bool = False, bucket: buckets.Access | None = None
) -> None:
    """Defines a flag for the path of a folder. `bucket` is as in `parse_path`."""
    parser = _Parser(functools.partial(parse_folder, bucket=bucket))
    flags.DEFINE(parser, name, None, about, required=required)


def define_workdirs(about: str) -> None:
    """Defines --workdir for commands that take several. The flag's value is a list of paths."""
    parser, about = _Parser(parse_workdirs), f"{about} Separated by commas."
    flags.DEFINE(parser, "workdir", None, about, required=True)


def define_size(name: str, default: str | None, about: str) -> None:
    """Defines a flag for a height and a width in pixels. The flag's value is a tuple."""
    flags.DEFINE(_Parser(parse_size), name, default, about)


def define_config() -> None:
    """Defines --config for commands that use `parse_flags`."""
    flags.DEFINE_string(
        "config", None, "Experiment: a file, or the name of a shipped experiment.", required=True
    )


def split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Returns the value of --config in a command line, and the other arguments."""
    arguments = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", "-config", nargs="?")
    found, others = finder.parse_known_args(arguments)
    return found.config, others


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags of a command with --config. Sets flags.FLAGS.config to the ConfigDict.

    Raises ValueError if the experiment has no get_config(), or if a flag sets an option that the
    config does not have.
    """
    name, others = split_config(argv)
    if name is None:
        return parse(argv)
    config: Any = load_config(name)
    words = (re.match(r"--?(?:no)?config\.([^=]+)", word) for word in others)
    check_fields(config, [word[1] for word in words if word])
    delattr(flags.FLAGS, "config")  # its value was the experiment's name
    config_flags.DEFINE_config_dict("config", config, flag_values=flags.FLAGS, sys_argv=others)
    rest = parse([argv[0], *others])
    _expand_paths(config)
    return rest


def changed_config(name: str, arguments: Sequence[str]) -> ConfigDict:
    """Returns an experiment's config with the changes of arguments --config.x=y."""
    config: Any = load_config(name)
    values, argv = flags.FlagValues(), [name, *arguments]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    _expand_paths(config)
    return config


def _expand_paths(config: Any) -> None:
    """Expands each "~" that the shell did not expand, and checks the access to buckets."""
    paths = ("data", "root"), ("model", "pretrained"), ("model", "initialize_from")
    for section, field in paths:
        if value := config.get(section, {}).get(field):
            config[section][field] = os.path.expanduser(value)
            if value.startswith("gs://"):
                buckets.check(value, "data" if section == "data" else "run")


def experiment_file(name: str) -> str:
    """Returns the path of the experiment file that --config names.

    name: The value of --config: a path, or the name of a shipped experiment, which may also be
      written experiments/NAME.py. A suffix ":ARGUMENT", which holds the argument of get_config(),
      is ignored.

    Raises ValueError if the file does not exist. The message suggests similar names.
    """
    file = os.path.expanduser(name.partition(":")[0])
    ours = {path.stem: path for path in sorted(EXPERIMENTS.glob("[!_]*.py"))}
    if file in ours:
        return str(ours[file])
    if not os.path.isfile(file):
        stem = Path(file).stem
        if file == f"experiments/{stem}.py" and stem in ours:  # outside a clone
            return str(ours[stem])
        known = {stem: stem for stem in ours}
        for folder in (Path("experiments"), Path(file).parent) if file.endswith(".py") else ():
            paths = folder.iterdir() if folder.is_dir() else ()
            known |= {path.stem: str(path) for path in sorted(paths) if path.suffix == ".py"}
        near = suggestion(stem, known, known, most=3)
        raise ValueError(f"no experiment file {file!r} (seen from {os.getcwd()}){near}")
    return file


def experiment(name: str) -> ModuleType:
    """Imports the experiment file that --config names. Raises ValueError if it is missing."""
    file = experiment_file(name)
    spec = importlib.util.spec_from_file_location("experiment", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(name: str) -> ConfigDict:
    """Returns the config that an experiment's get_config() returns."""
    get_config = getattr(experiment(name), "get_config", None)
    if get_config is None:
        raise ValueError(f"{name} has no get_config()")
    try:
        config = get_config(*name.split(":", 1)[1:])
    except TypeError as error:  # a wrong number of arguments, or a value of a wrong type
        raise ValueError(f"get_config() of {name}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(  # noqa: TRY004
            f"get_config() of {name} must return a ConfigDict, got {config!r}"
        )
    return config


def check_fields(config: ConfigDict, paths: Iterable[str]) -> None:
    """Raises ValueError if a config lacks one of the fields in `paths`, such as data.root."""
    for path in dict.fromkeys(paths):
        section: Any = config
        for name in path.split("."):
            valid = list(section) if isinstance(section, ConfigDict) else []
            if name not in valid:
                raise ValueError(
                    f"--config.{path}: no such field. Valid there: {', '.join(valid) or 'none'}"
                    f"{suggestion(name, valid)}"
                )
            section = section[name]
