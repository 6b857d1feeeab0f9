"""The command lines: every option is listed, grouped, takes effect, and is read."""
import argparse
import re
from pathlib import Path

import pytest
import torch

import data
import evaluate
import train
from data import InputError
from train import RECIPES, parse_options

ALTERNATIVES = {  # for each option of train.py, arguments that differ from the default
    "dataset": "voc", "data": "elsewhere", "method": "kd", "recipe": "full --dataset folder", "out": "there",
    "name": "mine",
    "teacher": "deeplabv3_resnet50", "teacher_weights": "w.pt", "teacher_steps": "3", "teacher_lr": "0.5",
    "pool_steps": "3", "clip": "RN101.pt",
    "student": "pvt_v2_b0", "student_weights": "w.pth", "steps": "3", "lr": "0.5", "kl": "reverse", "weights": "gb=7 lc=0.25",
    "batch_size": "2", "crop": "96", "base": "96", "warmup": "3",
    "gpus": "2", "workers": "3", "seed": "3", "deterministic": "",
    "log_every": "3", "report_every": "3", "val_every": "3", "val_images": "3",
}


def parser_of(run):
    """The ArgumentParser that `run` builds."""
    class Caught(Exception):
        pass

    def catch(parser, *_):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        run()
    return caught.value.args[0]


def options(parser):
    return [a for a in parser._actions if a.dest != "help"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize("run", [parse_options, evaluate.main, data.main], ids=["train", "evaluate", "data"])
def test_help_fits_a_screen_and_explains_every_option(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = parser_of(run)
    assert len(parser.format_help().splitlines()) < 60
    assert all(a.help or a.choices for a in options(parser))


@pytest.mark.parametrize("run", [parse_options, evaluate.main], ids=["train", "evaluate"])
def test_every_option_stands_in_a_group_of_its_own_kind(run):
    parser = parser_of(run)
    grouped = [a.dest for group in parser._action_groups[2:] for a in group._group_actions]
    assert sorted(grouped) == sorted(a.dest for a in options(parser))


def test_every_option_of_train_has_an_alternative_here():
    assert {a.dest for a in options(parser_of(parse_options))} == set(ALTERNATIVES)


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_option_changes_what_is_parsed(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    default = vars(parse_options([]))
    changed = vars(parse_options([f"--{name.replace('_', '-')}", *ALTERNATIVES[name].split()]))
    assert changed[name] != default[name]


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_option_is_read_after_parsing(name):
    program = Path(train.__file__).read_text()
    body = program[:program.index("def parse_options")] + program[program.index("def term_weights"):]
    assert re.search(rf"\bargs\.{name}\b", body)


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("dataset", ["shapes", "ade20k", "cityscapes", "voc", "folder"])
def test_recipe_fills_every_marked_option_and_no_other(dataset, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    marked = {a.dest for a in options(parser_of(parse_options)) if a.help.startswith("*")}
    args = parse_options(["--dataset", dataset])
    assert all(getattr(args, name) is not None for name in marked)
    assert all(set(recipe) == marked | {"scale"} for recipe in RECIPES.values())


def test_command_line_overrules_the_recipe():
    args = parse_options("--dataset ade20k --steps 7 --student mit_b1".split())
    assert (args.steps, args.student, args.crop) == (7, "mit_b1", RECIPES["ade20k"]["crop"])


@pytest.mark.parametrize("gpus, given, recipe", [(0, None, "small"), (1, None, "full"), (0, "full", "full"),
                                                 (1, "small", "small")])
def test_folder_has_two_recipes_and_the_machine_chooses_where_nobody_does(gpus, given, recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    args = parse_options(["--dataset", "folder", *(["--recipe", given] if given else [])])
    assert args.recipe == recipe
    assert {k: getattr(args, k) for k in RECIPES[recipe]} == RECIPES[recipe] | {"scale": list(RECIPES[recipe]["scale"])}


@pytest.mark.parametrize("dataset", ["shapes", "ade20k", "cityscapes", "voc"])
def test_other_data_sets_have_one_recipe_whatever_the_machine(dataset, monkeypatch):
    alone = parse_options(["--dataset", dataset])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parse_options(["--dataset", dataset]).crop == alone.crop == RECIPES[dataset]["crop"]
    assert alone.recipe == dataset
    with pytest.raises(InputError, match="--recipe small.*goes with --dataset folder"):
        parse_options(["--dataset", dataset, "--recipe", "small"])


@pytest.mark.parametrize("arguments, method, both", [
    ("", "c2vkd", True), ("--method c2vkd", "c2vkd", False), ("--method ce", "ce", False),
    ("--dataset voc", "c2vkd", False), ("--method teacher", "teacher", False)])
def test_without_a_method_shapes_trains_the_student_alone_too(arguments, method, both):
    args = parse_options(arguments.split())
    assert (args.method, args.both) == (method, both)


def test_rates_follow_the_weights_a_network_starts_from():
    random = parse_options([])
    assert (random.lr, random.teacher_lr) == (1e-3, 1e-3)
    pretrained = parse_options(["--student-weights", "w.pth", "--teacher-weights", "w.pt"])
    assert (pretrained.lr, pretrained.teacher_lr) == (6e-5, 0.01)


@pytest.mark.parametrize("arguments, named", [
    ("--steps 0", "--steps: must be at least "), ("--batch-size 1", "--batch-size: must be at least "),
    ("--crop 16", "--crop: must be at least "), ("--seed -1", "--seed: must be at least "),
    ("--lr 0", "--lr: must be"), ("--teacher-lr 0", "--teacher-lr: must be"),
    ("--lr nan", "--lr: must be"), ("--lr inf", "--lr: must be"), ("--val-every 0", "--val-every: must be at least "),
    ("--gpus 1", "--gpus 1"), ("--gpus -1", "--gpus: must be at least "), ("--teacher-weights voc", "--teacher-weights voc"),
    ("--weights gb", "gb=NUMBER"), ("--weights kd=1", "gb=NUMBER"), ("--method kd --weights released", "kd=NUMBER")])
def test_value_out_of_range_is_one_sentence_that_names_the_option(arguments, named):
    with pytest.raises(InputError, match=re.escape(named)):
        parse_options(arguments.split())


@pytest.mark.parametrize("arguments, named", [
    ("--student vit", "--student"), ("--dataset cifar", "--dataset"), ("--method none", "--method"),
    ("--recipe tiny", "--recipe"), ("--steps many", "--steps"), ("--lr fast", "--lr"), ("--steps", "--steps"),
    ("--unknown 1", "--unknown 1"), ("--compile", "--compile")])
def test_what_argparse_refuses_is_an_input_error_that_names_the_option(arguments, named):
    with pytest.raises(InputError, match=named):
        parse_options(arguments.split())
