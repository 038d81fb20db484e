"""Shares traced and compiled programs between trainings in one process."""

from collections.abc import Callable
from typing import Any

from dense_jax.devices import mesh
from dense_jax.training import task


def share_programs(replace: Callable[[Any, str, Any], None]) -> None:
    """Lets trainings with equal configs, but for seed, fold and data folder, share programs.

    replace: replace(module, name, function) puts a function in place of another, as setattr.
    """
    programs: dict = {}

    def shared(function):
        def call(config, *args, **options):
            alike = config.copy_and_resolve_references()
            alike.update(
                {"seed": 0, "data": {"root": "", "fold": 0}, "model": {"initialize_from": None}}
            )
            devices = [device.id for device in mesh.make_mesh().devices.flat]
            key = function.__name__, alike.to_json(), repr((args, options, devices))
            if key not in programs:
                programs[key] = function(config, *args, **options)
            return programs[key]

        return call

    for name in ("assemble", "bind", "place"):
        replace(task, name, shared(getattr(task, name)))
