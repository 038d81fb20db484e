"""Tests that each row gets the best of its learning rates, by trials that are none of its runs."""

import json
import pathlib

import pytest
from etils import epath

from dense_jax import sweep
from dense_jax.sweep import plan, tuning
from tests import forked

RATES = (0.1, 0.01, 0.001)
SWEEP = sweep.grid(**{"seed": [0, 1], "loss": ["a", "b"], tuning.RATE: [RATES]})


def finish(folder: pathlib.Path, score: float | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result = {"status": "finished", "best": {"eval/mean_iou": score}, "final": {}}
    (folder / "result.json").write_text(json.dumps(result))


def diverge(folder: pathlib.Path, error: str = "step 3: loss nan is not finite in x") -> None:
    folder.mkdir(parents=True)
    (folder / plan.FAILURE).write_text(json.dumps({"exit_code": 1, "error": error}))


def test_each_row_has_a_trial_for_each_rate_with_a_seed_of_its_own():
    *trials, a, b, a1, b1 = tuning.expand(SWEEP)
    assert [trial.override for trial in trials] == [
        {"seed": tuning.SEED, "loss": loss, tuning.RATE: rate} for loss in "ab" for rate in RATES
    ]
    assert all(trial.name.startswith("tuning/loss=") and not trial.trials for trial in trials)
    assert [run.name for run in (a, b1)] == ["loss=a,seed=0", "loss=b,seed=1"]
    names = tuple(trial.name for trial in trials)
    assert (a.trials, b.trials) == (names[:3], names[3:]) == (a1.trials, b1.trials)


def test_the_runs_of_a_row_may_have_folds_and_other_rows_no_rates():
    folds = sweep.grid(**{"data.folds": [2], "data.fold": range(2), tuning.RATE: [RATES[:2]]})
    *trials, first, second, plain = tuning.expand([*folds, {"loss": "b", tuning.RATE: 0.5}])
    assert [trial.override["data.fold"] for trial in trials] == [0, 0]
    assert first.trials == second.trials == tuple(trial.name for trial in trials)
    assert plain.trials == () and tuning.resolve(plain, epath.Path("none")) == plain.override


@pytest.mark.parametrize(
    ("scores", "rate"),
    [
        ([0.1, 0.3, 0.2], 0.01),
        ([0.3, 0.3, 0.3], 0.1),
        (["diverged", 0.1, 0.2], 0.001),
        ([None, 0.0, "diverged"], 0.01),  # the first has no score
    ],
)
def test_the_best_trial_chooses(tmp_path, scores, rate):
    run = tuning.expand(SWEEP)[-1]
    for trial, score in zip(run.trials, scores, strict=True):
        assert tuning.resolve(run, epath.Path(tmp_path)) is None
        folder = tmp_path / trial
        diverge(folder) if score == "diverged" else finish(folder, score)
    chosen = run.override | {tuning.RATE: rate}
    assert tuning.resolve(run, epath.Path(tmp_path)) == chosen
    tuning.record(run, epath.Path(tmp_path))
    written = json.loads((tmp_path / run.name / "tuning.json").read_text())
    expected = [None if score == "diverged" else score for score in scores]
    assert written == {"rates": list(RATES), "scores": expected, "num_seeds": 1}


@pytest.mark.parametrize("error", ["out of memory", "step 3: loss nan is not finite in x"])
def test_without_a_score_nothing_is_chosen(tmp_path, error):
    run = tuning.expand(SWEEP)[-1]
    for trial in run.trials:
        diverge(tmp_path / trial, error)
    assert tuning.resolve(run, epath.Path(tmp_path)) is None


def test_a_trial_of_several_seeds_has_their_mean(tmp_path):
    for seed, score in ((1000, 0.2), (1001, 0.4)):
        finish(tmp_path / f"seed={seed}", score)
    assert tuning.trial_score(epath.Path(tmp_path)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({tuning.RATE: []}, "learning_rate is an empty list in .*: give at least one rate"),
        ({tuning.RATE: RATES, "seed": 1000}, "seed 1000 is that of the trials"),
    ],
)
def test_invalid_rates_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        tuning.expand([override])


# A package that has its own trainer and else our modules; `python -m` looks first in its folder.
FAKE_MAIN = """
import json, pathlib, sys
args = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
workdir, rate = pathlib.Path(args["workdir"]), float(args["config.optimizer.learning_rate"])
config = {"seed": int(args["config.seed"]), "loss": args["config.loss"], "num_seeds": 1}
config |= {"optimizer": {"learning_rate": rate}, "data": {"root": args.get("config.data.root", "")}}
(workdir / "config.json").write_text(json.dumps(config))
if pathlib.Path("broken").exists() and config["loss"] == "b":
    sys.exit("error: no memory")
if rate == 0.1 and config["loss"] == "a":
    sys.exit("error: step 2: the loss is not finite in x")
best = {"eval/mean_iou": 1 - abs(rate - 0.02)}
(workdir / "result.json").write_text(json.dumps({"status": "finished", "best": best}))
"""
EXPERIMENT = f"""
from ml_collections import ConfigDict
def get_config():
    sections = {{"optimizer": {{"learning_rate": 0.5}}, "data": {{"root": ""}}}}
    return ConfigDict({{"seed": 0, "num_seeds": 1, "loss": "", **sections}})
def get_sweep():
    return {SWEEP}
"""


@pytest.fixture
def call(tmp_path):
    """Calls the sweep in a folder with a fake trainer. Returns how each command ends."""
    import dense_jax

    package = tmp_path / "dense_jax"
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__.append({dense_jax.__path__[0]!r})")
    (package / "main.py").write_text(FAKE_MAIN)
    (tmp_path / "tuned.py").write_text(EXPERIMENT)

    def ends(*commands):
        named = {
            i: ["dense_jax.sweep", "--config=tuned.py", *words.split()]
            for i, words in enumerate(commands)
        }
        return list(
            forked.run_all(
                named, "dense_jax.sweep.jobs", cwd=tmp_path, PYTHONPATH=str(tmp_path)
            ).values()
        )

    return ends


def rates_of(folder: pathlib.Path) -> dict[str, float]:
    """Returns the rate of each run in a folder."""
    return {
        path.parent.name: json.loads(path.read_text())["optimizer"]["learning_rate"]
        for path in folder.glob("*/config.json")
    }


def test_the_runs_have_the_rate_that_trials_chose_and_go_on_elsewhere(call, tmp_path):
    first, kept, listing, other = call(
        "--workdir=here --kept=kept",
        "--workdir=there --kept=kept --config.data.root=/elsewhere",
        "--workdir=new --kept=kept --list",
        "--workdir=other --kept=kept --config.num_seeds=3",
    )
    assert first.code == 0, first.err  # although a trial diverged
    assert first.out.startswith("6 trials of learning rates come first\n[1/6] tuning/loss=a,")
    assert rates_of(tmp_path / "here") == dict.fromkeys(
        (f"loss={loss},seed={seed}" for loss in "ab" for seed in (0, 1)), 0.01
    )
    # Elsewhere, only the trial that diverged is tried again.
    assert kept.code == 0 and kept.out.count(": starts") == 1, kept.err
    assert rates_of(tmp_path / "there") == rates_of(tmp_path / "here")
    assert listing.out.count("  kept  ") == 9 and not (tmp_path / "new").exists()
    assert "--config.num_seeds: 'not set' there, '3' now" in other.err


def test_rows_whose_trials_fail_wait_and_the_others_do_not(call, tmp_path):
    (tmp_path / "broken").touch()
    index, failed = call("--workdir=here --index=6", "--workdir=here")
    (tmp_path / "broken").unlink()
    assert index.code == 1 and index.err.endswith("have no score:\n  loss=a,seed=0\n")
    assert failed.code == 1
    assert failed.err.endswith("have no score:\n  loss=b,seed=0\n  loss=b,seed=1\n")
    assert set(rates_of(tmp_path / "here")) == {"loss=a,seed=0", "loss=a,seed=1"}
    (again,) = call("--workdir=here")
    assert again.code == 0 and len(rates_of(tmp_path / "here")) == 4
