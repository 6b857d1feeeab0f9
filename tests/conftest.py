"""What several test files share: tiny data, a tiny teacher, whole runs and what they leave."""
import csv
import hashlib
import shutil
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import teacher
import train

torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another
RESNET10 = teacher.TEACHERS["deeplabv3_resnet10"]
TEACHER = "teacher-deeplabv3_resnet10"  # its folder


def small_net(classes):
    """In place of ResNet-10: BatchNorm and Dropout as there, and a checkpoint quick to write."""
    net = nn.Module()
    layers = OrderedDict(conv=nn.Conv2d(3, 512, 8, 8, bias=False), bn=nn.BatchNorm2d(512),
                         relu=nn.ReLU())
    net.backbone = IntermediateLayerGetter(nn.Sequential(layers), {"conv": "map", "relu": "out"})
    net.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(512, 256, 1),
                                   nn.Conv2d(256, classes, 1))
    return net


SMALL = replace(RESNET10, build=small_net, earlier=(512,))


@pytest.fixture(scope="module")
def small_teacher():
    """The small teacher, and pytest's own signal handlers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teacher.TEACHERS, "deeplabv3_resnet10", SMALL)
        patch.setattr(train.Stop, "listen", lambda: None)
        yield


def put_folder(root, train_images=12, sides=(32, 64), unlabelled=0):
    """A data set of three classes in the layout of `folder`, random blocks in the train split."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train_images), ("val", 2), ("unlabelled", unlabelled)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            blocks = Image.fromarray(rng.integers(0, 3, (4, 4)).astype(np.uint8))
            label = np.asarray(blocks.resize(rng.integers(*sides, 2, endpoint=True).tolist(), 0))
            image = 80 * label[..., None] + rng.integers(0, 40, (*label.shape, 3))
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
    shutil.rmtree(root / "labels" / "unlabelled")
    (root / "classes.txt").write_text("road 128 64 128\nsky 70 130 180\ncar 0 0 142\n")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return put_folder(tmp_path_factory.mktemp("data") / "folder")


def options(folder, out, *more):
    """The command line of a tiny run."""
    return ["--dataset", "folder", "--data", str(folder), "--out", str(out), "--gpus", "0",
            "--teacher", "deeplabv3_resnet10", "--teacher-weights", "none",
            "--teacher-steps", "4", "--pool-steps", "4", "--student", "mit_nano", "--steps", "4",
            "--batch-size", "2", "--crop", "32", "--base", "32", "--log-every", "1",
            "--val-every", "3", *map(str, more)]


def parsed(argv):
    """The options as main hands them to train."""
    args = train.parse_options(argv)
    args.device = torch.device("cpu")
    return args


def run(argv):
    """Train as main does."""
    train.train(parsed(argv))


def error_of(main, argv, capsys):
    """The one line that `main` shows for bad input, without its "error: "."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["x.py", *map(str, argv)])
        data.command(main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert "Traceback" not in "".join(lines) and sum("error: " in line for line in lines) == 1
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: ")


def rows_of(folder):
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def bits(value):
    """A checkpoint's content as something == compares bit by bit."""
    if isinstance(value, torch.Tensor):
        digest = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        return str(value.dtype), tuple(value.shape), digest
    if isinstance(value, dict):
        return {k: bits(v) for k, v in value.items()}
    return [bits(v) for v in value] if isinstance(value, (list, tuple)) else value


def result(out):
    """What a run left: checkpoints bit by bit, logs without their seconds, scores, pictures."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        key = str(path.relative_to(out))
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            for row in state["rows"]:
                row.pop("seconds_per_step", None)
            found[key] = bits(state)
        elif path.suffix == ".csv":
            found[key] = [{k: v for k, v in row.items() if k != "seconds_per_step"}
                          for row in rows_of(path.parent)]
        elif path.name != ".lock":
            found[key] = path.read_bytes()
    return found


def differing(out, expected):
    """Names of the files in which a folder differs from a `result`."""
    found = result(out)
    return [k for k in sorted(found.keys() | expected.keys()) if found.get(k) != expected.get(k)]
