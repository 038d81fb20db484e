"""Tests that a plan follows from the dataset and the time, and that its experiment file trains."""

import itertools

import numpy as np
import pytest

from dense_jax import command, config, plan, train
from dense_jax.models import weight_files
from dense_jax.plan import Trial

SPEED = 400_000  # pixels per second of a device that needs no trials


@pytest.fixture
def device(monkeypatch):
    """Replaces trials by the measurements of a device with a constant speed.

    Returns the options and the seconds of training of each trial.
    """
    trials = []

    def trial(choices, num_steps=plan.TRIAL_STEPS):
        values = {choice.option: choice.value for choice in choices}
        width = values.get("model.widths", (16,))[0]
        pixels = values["batch_size"] * np.prod(values["data.crop_size"])
        step = float(pixels / SPEED * width / 16)
        trials.append((values, num_steps * step))
        return Trial(step, 0.5, 20.0, 10**9, 10**8)

    monkeypatch.setattr(plan, "trial", trial)
    return trials


def planned(root, seconds, **options):
    """Plans for the tiny folder. Returns the values of the options, and the expected seconds."""
    found = plan.plan("folder", str(root), seconds, use_pretrained=False, **options)
    return {choice.option: choice.value for choice in found.choices}, found.seconds


def test_the_experiment_file_is_valid_and_trains(device, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "FROM_SCRATCH", (2,))
    monkeypatch.setattr(plan, "BATCH_PIXELS", (2 * 16**2, 2 * 16**2))
    found = plan.plan("folder", str(tiny_folder), 25.0, use_pretrained=False)
    file = tmp_path / "planned.py"
    file.write_text(plan.experiment_text(found.choices, "A plan."))
    planned_config = command.load_config(str(file))
    config.check(planned_config)
    for option, value, _ in found.choices:
        node = planned_config
        for name in option.split("."):
            node = node[name]
        assert node == value
    planned_config.update(num_steps=2, eval_every=2)
    planned_config.optimizer.warmup_steps = 1
    train.train(planned_config, str(tmp_path / "run"))
    assert (tmp_path / "run" / "result.json").exists()


def test_more_time_never_lowers_the_resolution_or_the_network(device, tiny_folder, monkeypatch):
    monkeypatch.setattr(plan, "EPOCHS", 500)
    monkeypatch.setattr(plan, "SLOWER_EPOCHS", 50_000)
    sizes = []
    for seconds in (25.0, 30.0, 60.0, 300.0, 3000.0):
        values, expected = planned(tiny_folder, seconds)
        sizes.append((values["model.widths"][0], values["data.resolution"], values["num_steps"]))
        assert expected <= seconds
        steps = values["num_steps"]
        assert 0.8 * seconds < expected or steps == plan.MOST_STEPS
        assert values["optimizer.warmup_steps"] <= steps
    for shorter, longer in itertools.pairwise(sizes):
        assert longer[0] > shorter[0] or longer[1] >= shorter[1]
    assert sizes[0][:2] < sizes[-1][:2]


def test_a_plan_is_made_of_what_the_last_trial_ran(device, tiny_folder):
    values, _ = planned(tiny_folder, 60.0)
    tried, seconds = device[-1]
    assert tried.items() <= values.items()
    assert seconds >= plan.TRIAL_SECONDS


def test_few_images_are_evaluated_if_all_would_take_too_long():
    measured = Trial(step=0.1, evaluation=2.0, rest=10.0, memory=1, device_memory=1)
    for num_images, evaluated in ((5, None), (45, None), (46, 45)):
        choices, expected = plan.schedule(measured, 900.0, num_images)
        values = {choice.option: choice.value for choice in choices}
        assert values.get("eval.num_images") == evaluated
        num_evaluations = -(-values["num_steps"] // values["eval_every"])
        assert num_evaluations * 2.0 * (evaluated or num_images) <= 0.1 * 900
        assert 0.9 * 900 < expected <= 900


def test_too_short_a_time_is_refused(device, tiny_folder):
    with pytest.raises(ValueError, match="20 s are too short: the start takes 20 s"):
        planned(tiny_folder, 20.0)


def test_normalization_and_augmentation_follow_from_the_images(device, tiny_folder, monkeypatch):
    monkeypatch.setattr(plan, "MANY_EPOCHS", 0)
    values, _ = planned(tiny_folder, 60.0)
    assert values["model.normalization"] == "dataset"
    assert values["augment.rotation"] == 10.0
    assert (values["augment.flip"], values["augment.flip_vertical"]) == (0.5, 0.0)
    measure = plan.fingerprint.measure
    monkeypatch.setattr(
        plan.fingerprint,
        "measure",
        lambda source: measure(source)._replace(**changes),
    )
    changes = {"exposure_spread": 2.0, "upright": 0.0}
    values, _ = planned(tiny_folder, 60.0)
    assert values["model.normalization"] == "image"
    assert (values["augment.rotation"], values["augment.flip_vertical"]) == (180.0, 0.5)
    monkeypatch.setattr(plan, "MANY_EPOCHS", 10**9)
    values, _ = planned(tiny_folder, 60.0)
    assert (values["augment.flip"], values["augment.gamma"]) == (0.5, 0.4)
    assert "augment.rotation" not in values
    changes["displacement"] = (-0.6, 0.5)  # a flip would turn it around
    values, _ = planned(tiny_folder, 60.0)
    assert (values["augment.flip"], values["augment.flip_vertical"]) == (0.0, 0.0)
    changes |= {"displacement": (0.0, 0.0), "num_objects": 10_000}
    values, _ = planned(tiny_folder, 60.0)
    assert values["augment.flip"] == 0.0


def test_rare_classes_are_weighted_so_that_a_mean_pixel_counts_once(
    device, tiny_folder, monkeypatch
):
    values, _ = planned(tiny_folder, 60.0)
    assert "loss_options.class_weights" not in values
    measure, shares = plan.fingerprint.measure, np.array([0.9996, 0.0004])
    monkeypatch.setattr(
        plan.fingerprint, "measure", lambda source: measure(source)._replace(shares=shares)
    )
    weights = np.array(planned(tiny_folder, 60.0)[0]["loss_options.class_weights"])
    assert weights[1] / weights[0] == pytest.approx(np.sqrt(shares[0] / shares[1]), rel=0.01)
    assert np.sum(weights * shares) == pytest.approx(1, rel=0.01)


def test_pretrained_weights_are_used_if_they_are_on_this_computer(device, tiny_folder, monkeypatch):
    monkeypatch.setattr(weight_files, "is_at_hand", lambda source: "resnet18" in source)
    found = plan.plan("folder", str(tiny_folder), 60.0)
    values = {choice.option: choice.value for choice in found.choices}
    assert (values["model.encoder"], values["model.pretrained"]) == ("resnet18", "imagenet")


def test_a_failing_trial_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"a trial of 30 steps failed: error: .*no such folder"):
        plan.trial(
            [plan.Choice("data.name", "folder"), plan.Choice("data.root", str(tmp_path / "x"))]
        )


def test_a_trial_measures_times_and_memory(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    options = {
        "data.name": "folder",
        "data.root": str(tiny_folder),
        "data.crop_size": (8, 8),
        "model.widths": (2,),
        "batch_size": 2,
    }
    measured = plan.trial([plan.Choice(*item) for item in options.items()])
    assert min(measured) > 0
    assert measured.step < measured.rest
    assert measured.memory > measured.device_memory
    assert not list(tmp_path.iterdir())  # it compiles its programs, as the planned run will
