"""The parts that all commands share: flags, experiment files, and the end on a user's mistake.

A mistake (a flag, a field, a file, a full disk) ends a command with one line, `error: ...`, and exit
status 1. With --verbosity=1 the traceback is shown instead. Never uses jax.
"""

import argparse
import glob
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from dense_jax.spelling import suggestion

MISTAKES = (ValueError, OSError, FloatingPointError, SyntaxError, flags.Error)
WRITTEN_TO = ("output", "picture", "workdir")  # flags, of which a command writes to the first given

flags.disclaim_key_flags()  # those defined here are the command's, and so in its --help


def parse(argv: list[str]) -> list[str]:
    """Parses the flags of a command that takes nothing else."""
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
        near = suggestion(rest[1].partition("=")[0], flags.FLAGS)
        raise ValueError(
            f"unexpected arguments: {' '.join(rest[1:])} (flags are --NAME=VALUE; quote globs){near}"
        )
    return rest


def run(main: Callable[[list[str]], Any], *, flags_parser: Callable = parse) -> None:
    """Parses the flags and calls main(argv); a mistake becomes one line and exit status 1."""
    # The terminal's encoding may lack the letters of a class name.
    sys.stdout.reconfigure(errors="backslashreplace")  # pyrefly: ignore
    try:
        app.run(main, flags_parser=flags_parser)
    except MISTAKES as error:
        if any(re.fullmatch("--?v(erbosity)?=[1-9]", word) for word in sys.argv):
            raise
        sys.exit(f"error: {_text(error)}")


def _text(error: BaseException) -> str:
    """Returns the error's message. That of a full disk names no file: where we write is added."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        for name in WRITTEN_TO:
            if name in flags.FLAGS and (path := flags.FLAGS[name].value):
                return f"{error}; the command writes to --{name}={path}"
    return str(error)


class _Path(flags.ArgumentParser):
    """A path, in which the shell may have left "~"."""

    def parse(self, argument: str) -> str:
        if not argument:
            raise ValueError("must not be empty")
        return os.path.expanduser(argument)


class _Folder(_Path):
    """A folder, which may not be there yet."""

    def parse(self, argument: str) -> str:
        path = super().parse(argument)
        if os.path.isfile(path):
            raise ValueError("is a file, not a folder")
        return path


class _Size(flags.ArgumentParser):
    """HEIGHT,WIDTH in pixels."""

    def parse(self, argument: str) -> tuple[int, ...]:
        words = argument.split(",")
        if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
            raise ValueError("must be HEIGHT,WIDTH in pixels, such as 224,224")
        return tuple(map(int, words))


class _Tuple(flags.ArgumentParser):
    """Parses a tuple as ml_collections does, but of several flags the last one wins, as elsewhere.

    Values of a `TupleParser` itself are joined.
    """

    def parse(self, argument: Any) -> tuple:
        return tuple_parser.TupleParser().parse(argument)


config_flags.register_flag_parser_for_type(tuple, _Tuple())


def define_path(name: str, about: str, *, required: bool = False) -> None:
    """Defines a flag for a file, or for what may be a file or a folder."""
    flags.DEFINE(_Path(), name, None, about, required=required)


def define_folder(name: str, about: str, *, required: bool = False) -> flags.FlagHolder:
    """Defines a flag for a folder."""
    return flags.DEFINE(_Folder(), name, None, about, required=required)


def define_size(name: str, default: str | None, about: str) -> None:
    """Defines a flag for a height and a width in pixels, of which the value is a tuple."""
    flags.DEFINE(_Size(), name, default, about)


def experiment(path: str) -> ModuleType:
    """Runs the experiment file of a path that may end in ":ARGUMENT".

    Raises ValueError if there is none.
    """
    file = os.path.expanduser(path.partition(":")[0])
    if not os.path.isfile(file):
        folder = glob.escape(os.path.dirname(file) or ".")
        there = [*glob.glob("experiments/*.py"), *glob.glob(f"{folder}/*.py")]
        paths = {os.path.basename(path): path for path in there}
        near = suggestion(os.path.basename(file), paths, paths)
        raise ValueError(f"no experiment file {file!r} (seen from {os.getcwd()}){near}")
    spec = importlib.util.spec_from_file_location("experiment", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags of a command that has --config.

    Raises ValueError, where ml_collections raises all sorts, if the experiment file has no config
    or a flag is for a field that the config does not have.
    """
    argv = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)]
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", "-config", nargs="?")
    found, others = finder.parse_known_args(argv[1:])
    if found.config is None:
        return parse(argv)
    path = os.path.expanduser(found.config)
    words = (re.match(r"--?(?:no)?config\.([^=]+)", word) for word in others)
    check_fields(path, [word[1] for word in words if word])
    rest = parse([argv[0], f"--config={path}", *others])
    config: Any = flags.FLAGS["config"].value
    for section, field in (("data", "root"), ("model", "pretrained")):
        if config.get(section, {}).get(field):
            config[section][field] = os.path.expanduser(config[section][field])
    return rest


def _config(path: str) -> ConfigDict:
    """Returns the config of an experiment file, by its get_config()."""
    get_config = getattr(experiment(path), "get_config", None)
    if get_config is None:
        raise ValueError(f"{path} has no get_config()")
    arguments = path.split(":", 1)[1:]
    try:
        config = get_config(*arguments)
    except TypeError as error:  # of another argument, or a field of another type
        raise ValueError(f"get_config() of {path}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(  # noqa: TRY004
            f"get_config() of {path} must return a ConfigDict, got {config!r}"
        )
    return config


def check_fields(path: str, fields: Iterable[str]) -> None:
    """Raises ValueError if the config of an experiment file does not have one of the fields."""
    as_written = _config(path)
    for field in dict.fromkeys(fields):
        config: Any = as_written
        for name in field.split("."):
            valid = list(config) if isinstance(config, ConfigDict) else []
            if name not in valid:
                raise ValueError(
                    f"--config.{field}: no such field. Valid there: {', '.join(valid) or 'none'}"
                    f"{suggestion(name, valid)}"
                )
            config = config[name]
