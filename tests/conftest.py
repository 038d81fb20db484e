"""Sets up all tests: four CPU devices, strict rank promotion, fast compilation, and fixtures."""

import json
import os
import pathlib
import shutil

import jax
import jaxtyping
import numpy as np
import pytest
from absl import flags
from PIL import Image

REPOSITORY = pathlib.Path(__file__).parents[1]
# JAX options for this process and for every command that a test starts.
OPTIONS = {
    "jax_platforms": "cpu",
    # Tests check values, not speed, and spend most of their time compiling.
    "jax_disable_most_optimizations": True,
    # Other tests, and later runs of the suite, reuse the compiled programs.
    "jax_compilation_cache_dir": str(REPOSITORY / ".pytest_cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}
for option, value in OPTIONS.items():
    jax.config.update(option, value)
    os.environ[option.upper()] = str(value)
# As `runtime.keep_memory` has it: commands then find the programs that tests compiled.
XLA_FLAGS = ["--xla_cpu_enable_concurrency_optimized_scheduler=false"]
# jax.jit's compiler_options for programs that must agree with others to the last bit.
AS_USUAL = {}
if jax.__version_info__ < (0, 11):  # later versions have no such flag
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # halves the time to compile a step
    AS_USUAL["xla_cpu_use_fusion_emitters"] = True
os.environ["XLA_FLAGS"] = " ".join([*XLA_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()


# The files that take longest, in the order in which they start.
SLOWEST = (
    *("test_train", "test_readme", "test_multihost", "test_models", "test_ensemble", "test_export"),
    *("test_evaluate", "test_regions", "test_steps", "test_runtime", "test_summary"),
)


def pytest_collection_modifyitems(items):
    """Starts the slowest files first."""
    order = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def mesh_of(num_devices: int) -> jax.sharding.Mesh:
    """Returns a mesh like `mesh.make_mesh`, with the first `num_devices` devices."""
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((1, num_devices), ("replica", "data"), axis_types=(auto, auto))


@pytest.fixture(scope="session")
def shared_programs():
    """Lets trainings with equal configs share traced and compiled programs in this process."""
    from tests.shared import share_programs

    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch.setattr)
        yield


@pytest.fixture(scope="module")
def unchecked_shapes():
    """Annotations like "h/2" are compared with numbers; in an export they would meet symbols."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """Keeps tests from reading or writing the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """Returns the folder with `camvid` and `isbi2012` in the folder layout, or skips the test."""
    root = os.environ.get("DENSE_JAX_DATA", "")
    if not root:
        pytest.skip("needs real images: set DENSE_JAX_DATA to a folder with camvid and isbi2012")
    return pathlib.Path(root)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> pathlib.Path:
    """Creates a folder dataset of small images of several sizes, half bright and half dark."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for split, num_images in (("train", 7), ("val", 3), ("test", 5)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(num_images):
            h, w = 12 + 2 * (i % 3), 16 - (i % 2)
            label = np.indices((h, w))[i % 2] * 2 // (h, w)[i % 2]
            image = 60 + 120 * label + rng.integers(-20, 20, (h, w))
            label[0, : i + 1] = 9
            for kind, pixels in (("images", image), ("labels", label)):
                Image.fromarray(pixels.astype(np.uint8)).save(root / kind / split / f"{i}.png")
    options = {"classes": ["dark", "bright"], "ignored_values": [9]}
    (root / "dataset.json").write_text(json.dumps(options))
    return root


@pytest.fixture(scope="module")
def browser():
    """Starts headless Chromium without access to other machines, or skips the test."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"),
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as opened:
        yield opened
