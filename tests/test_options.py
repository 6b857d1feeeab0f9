"""The command line of train.py: recipes, defaults that follow from others, refused values."""
import re

import pytest
import torch

import losses
from data import DATASETS, InputError
from train import RECIPES, parse_options, parser


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_recipe_fills_every_option_that_the_help_marks(dataset):
    marked = {a.dest for a in parser()._actions if a.help.startswith("*")}
    args = parse_options(["--dataset", dataset])
    assert all(a.help or a.choices for a in parser()._actions)
    assert all(getattr(args, name) is not None for name in marked)
    assert all(set(recipe) - {"vlfd"} == marked | {"scale"} for recipe in RECIPES.values())


@pytest.mark.parametrize("gpus, given, recipe", [
    (0, None, "small"), (1, None, "full"), (0, "full", "full"), (1, "small", "small")])
def test_own_data_has_two_recipes_and_the_machine_chooses_where_nobody_does(gpus, given, recipe,
                                                                            monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    args = parse_options(["--dataset", "folder", *(["--recipe", given] if given else [])])
    assert args.recipe == recipe and args.gpus == gpus
    assert {k: getattr(args, k) for k in RECIPES[recipe]} == RECIPES[recipe]
    assert parse_options([]).recipe == "shapes"  # others have one, whatever the machine


@pytest.mark.parametrize("arguments, method, students", [
    ("", "c2vkd", ["ce", "c2vkd"]), ("--method c2vkd", "c2vkd", ["c2vkd"]),
    ("--method ce", "ce", ["ce"]), ("--dataset voc", "c2vkd", ["c2vkd"]),
    ("--method teacher", "teacher", [])])
def test_without_a_method_shapes_trains_the_student_alone_too(arguments, method, students):
    args = parse_options(arguments.split())
    assert (args.method, args.methods) == (method, students)


def test_rates_follow_the_weights_that_a_network_starts_from():
    args = parse_options([])
    assert (args.lr, args.teacher_lr) == (1e-3, 1e-3)
    args = parse_options(["--student-weights", "w.pth", "--teacher-weights", "w.pt"])
    assert (args.lr, args.teacher_lr) == (6e-5, 0.01)


def test_weights_of_terms_are_changed_one_by_one():
    for given in ("--weights gb=7 lc=0.25", "--weights gb=7 --weights lc=0.25"):
        changed = parse_options(["--dataset", "folder", *given.split()]).term_weights
        assert changed == losses.METHODS["c2vkd"].weights | {"gb": 7.0, "lc": 0.25}
    assert losses.METHODS["c2vkd"].weights["gb"] == 1


@pytest.mark.parametrize("method", losses.METHODS)
def test_shapes_has_strong_feature_losses_at_one_depth(method):
    weights = losses.METHODS[method].weights
    assert parse_options(["--method", method, "--dataset", "voc"]).term_weights == weights
    if method in ("c2vkd", "c2vkd_right", "c2vkd_reverse", "vlfd"):
        weights = weights | {"gb": 10, "pc": 20, "lc": 2}
    assert parse_options(["--method", method]).term_weights == weights


@pytest.mark.parametrize("arguments, named", [
    ("--method at", "--method"), ("--steps 0", "--steps: must be at least 1"),
    ("--batch-size 1", "--batch-size: must be at"), ("--crop 31", "--crop: must be at least 32"),
    ("--seed -1", "--seed: must be at least 0"), ("--lr 0", "--lr: must be"),
    (f"--seed {2 ** 32}", "--seed: must be at least 0 and below"),
    ("--lr nan", "--lr: must be"), ("--lr inf", "--lr: must be"),
    ("--workers -1", "--workers: must be at least 0"), ("--gpus -1", "--gpus: must be at least"),
    ("--gpus 1", "--gpus 1: 0 CUDA devices found; use --gpus 0"),
    ("--data mine", "--data mine: say what it holds, with --dataset folder for your own data"),
    ("--teacher-weights voc", "--teacher-weights voc: that model knows VOC's classes only"),
    ("--dataset voc --recipe small", "--recipe small: voc has one recipe"),
    ("--name ..", "--name ..: leaves the folder"), ("--name /a", "--name /a: leaves the folder"),
    ("--method ce --name kd-seed0", "--name kd-seed0: reserved for a method or a teacher"),
    ("--name teacher-mine", "--name teacher-mine: reserved for a method or a teacher"),
    ("--method kd --clip RN101.pt", "--clip: kd uses no attention pool"),
    ("--weights gb", "c2vkd takes pdd=NUMBER gb=NUMBER"), ("--weights gb=nan", "gb=NUMBER"),
    ("--method kd --weights gb=1", "--weights gb=1: kd takes ce=NUMBER kd=NUMBER"),
    ("--method teacher --weights gb=1", "--method teacher: trains no student"),
    ("--method teacher --name mine", "--method teacher: trains no student")])
def test_a_value_that_cannot_be_used_is_one_line_that_names_its_option(arguments, named):
    with pytest.raises(InputError, match=re.escape(named)) as e:
        parse_options(arguments.split())
    assert "\n" not in str(e.value)
