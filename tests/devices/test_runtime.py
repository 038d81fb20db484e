"""Tests where compiled programs are cached, and what is logged about runtime."""

import importlib.util
import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dense_jax import storage
from dense_jax.data import balance, open_dataset, verify
from dense_jax.devices import runtime
from tests.conftest import OPTIONS, REPOSITORY


@pytest.fixture
def kept_in():
    """Returns where keep_programs keeps them, if the user has set a folder or none."""
    before = jax.config.jax_compilation_cache_dir
    assert before == OPTIONS["jax_compilation_cache_dir"]

    def call(own=None):
        jax.config.update("jax_compilation_cache_dir", own)
        runtime.keep_programs()
        return jax.config.jax_compilation_cache_dir

    yield call
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache_unless_a_folder_is_set(kept_in):
    assert kept_in() == f"{storage.cache_folder()}/programs"
    assert kept_in("/somewhere/else") == "/somewhere/else"
    assert str(storage.cache_folder()).startswith(os.environ["XDG_CACHE_HOME"])


def test_without_a_home_folder_nothing_is_kept_and_all_works(kept_in, tiny_folder, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # for a user that is not known
    assert kept_in() is None
    source = open_dataset("folder", str(tiny_folder), "train")
    verify.verify(source)
    assert balance.class_counts(source).shape == (7, 2)


def test_a_cache_that_cannot_be_made_is_done_without(kept_in, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", __file__)
    assert kept_in() is None


@pytest.mark.parametrize("platform", ["cpuu", "cuda"])
def test_a_platform_that_is_not_here_is_named_with_those_that_are(platform):
    if platform == "cuda" and importlib.util.find_spec("jax_plugins"):
        pytest.skip("may have one")
    code = "from dense_jax.devices import runtime; runtime.check_devices()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": platform},
        check=False,
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert re.search(
        f"^ValueError: JAX_PLATFORMS={platform} cannot be .* Here JAX has: .*cpu", last
    )


def test_the_process_started_before_now():
    began = runtime.seconds_of_process()
    time.sleep(0.1)
    assert 0 < began + 0.05 < runtime.seconds_of_process()


def test_a_command_keeps_its_programs_and_says_what_starting_took(tiny_folder, tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    command = [
        *(sys.executable, "-m", "dense_jax.main", "--config=experiments/unet_ce.py"),
        *("--config.data.name=folder", f"--config.data.root={tiny_folder}"),
        *("--config.model.widths=(2,3)", "--config.data.crop_size=(8,8)"),
        *("--config.num_steps=1", f"--workdir={tmp_path}/run"),
    ]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True
    )
    programs = {path.name for path in (tmp_path / "cache" / "dense_jax" / "programs").iterdir()}
    assert any(name.startswith("jit_train_step") for name in programs)
    (seconds,) = re.findall(r"the first step was done (\S+) s after the start", done.stderr)
    assert 0 < float(seconds) < time.monotonic() - start


def test_freed_memory_stays_with_the_process():
    """A block of 128 MB, taken again by a thread of XLA's kind, has its pages still."""
    code = (
        "import resource, threading; import numpy as np; from dense_jax.devices import runtime\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    thread = threading.Thread(target=np.ones, args=(2**24,))\n"
        "    thread.start(); thread.join()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "runtime.keep_memory(); print(faults(), faults())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    first, second = map(int, done.stdout.split())
    assert second < first / 2


def test_a_training_step_has_fewer_temporaries_unless_the_user_says_otherwise():
    """XLA reads its flags once, so in processes of their own."""
    code = (
        "from dense_jax.devices import runtime; runtime.keep_memory(); runtime.keep_memory()\n"
        "import jax; from dense_jax.devices import cost; from dense_jax.devices.cpu import convolution\n"
        "def loss(kernels, x):\n"
        "    for kernel in kernels:\n"
        "        x = jax.nn.relu(convolution(x, kernel, (1, 1), 'SAME'))\n"
        "    return x.sum()\n"
        "x, *kernels = (jax.ShapeDtypeStruct(s, 'float32') for s in [(4, 64, 64, 8)] + 6 * [(3, 3, 8, 8)])\n"
        "print(cost.memory(jax.jit(jax.grad(loss)).lower(kernels, x).compile())['temporaries'])"
    )
    usual = runtime.XLA_CPU_FLAGS[0].replace("false", "true")
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", code],
                cwd=REPOSITORY,
                env=os.environ | {"XLA_FLAGS": flags},
                capture_output=True,
                check=True,
            ).stdout
        )
        for flags in ("", usual)
    )
    assert few < 0.9 * many


def test_the_level_of_optimization_on_cpus_changes_no_bit():
    """Random numbers, and a gradient with sums and elementwise functions."""

    def gradient(key):
        x = jax.random.truncated_normal(key, -2.0, 2.0, (4, 6, 6, 8))
        kernel = jax.random.normal(key, (8, 5))
        return x, jax.grad(lambda x: -jax.nn.log_softmax(jax.nn.relu(x) @ kernel)[..., 0].mean())(x)

    (level,) = re.findall(r"optimization_level=(\d)", " ".join(runtime.XLA_CPU_FLAGS))
    lowered = jax.jit(gradient).lower(jax.random.key(0))
    ours, usual = (
        lowered.compile({"xla_backend_optimization_level": value})(jax.random.key(0))
        for value in (level, "3")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, usual)
