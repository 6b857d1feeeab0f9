"""Every command and every block of Python on the pages runs, in its order, with few steps."""
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import evaluate
import losses
import teacher
import train

ROOT = Path(__file__).parent.parent
PAGES = "README.md", ".github/TEACH.md", ".github/DETAILS.md"
TEXT = "".join((ROOT / page).read_text("utf-8") for page in PAGES)
CUT = "--teacher-steps 2 --pool-steps 2 --steps 4 --batch-size 2 --log-every 2"
NOT_RUN = ("pip install -r requirements.txt",
           "python train.py --dataset ade20k --gpus 1")  # it downloads a gigabyte and wants a GPU
SCRIPTS = {"train.py": train.main, "evaluate.py": evaluate.main, "data.py": data.main}


def commands(block):
    """The lines of a block of bash, its loop written out, for the first seed alone."""
    loop = re.search(r"for (\w+) in ([^;]+); do\s+(.*)[;\n]\s*done", block, re.S)
    if not loop:
        return [line.split(" || ")[0].strip() for line in block.strip().splitlines()]
    name, values, body = loop.groups()
    lines = commands(block[:loop.start()])
    for value in values.split()[:1 if name == "s" else None]:
        lines += commands(body.replace(f"${name}", value))
    return lines + commands(block[loop.end():])


def draw_own_data(root):
    """What the pages take for granted below path/to."""
    data.make_shapes(root / "data")
    (root / "data/images/unlabelled").mkdir()
    for i in range(3):
        data.draw_shapes(1, i)[0].save(root / f"data/images/unlabelled/more{i}.png")
    Image.new("RGB", (50, 40), "olive").save(root / "photo.jpg")
    for name, values in (("from_one", [1, 2]), ("masks", [0, 255])):
        (root / name / "labels").mkdir(parents=True)
        Image.fromarray(np.array([values], np.uint8)).save(root / name / "labels/a.png")

    picture = Image.new("RGB", (64, 48))
    picture.paste((9, 0, 9), (0, 0, 32, 48))
    picture.paste((9, 9, 9), (0, 0, 16, 48))
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (root / "export" / folder).mkdir(parents=True)
        for i in range(20):
            picture.save(root / "export" / folder / f"frame{i:02d}.{ending}")
    (root / "export/labelmap.txt").write_text("ignore:0,0,0::\ncar:9,0,9::\nbus:9,9,9::\n")


class Encoder(nn.ModuleList):
    """In place of the encoder of segmentation_models_pytorch's DeepLabV3."""

    def forward(self, x):
        return [x, *(layer(x) for layer in self)]


@pytest.fixture
def as_a_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 8, "val": 2, "test": 2})
    monkeypatch.setattr(train.Stop, "listen", lambda: None)  # pytest's own handlers stay
    draw_own_data(tmp_path / "path/to")
    with patch.dict(losses.METHODS), patch.dict(teacher.TEACHERS):  # what the pages add goes
        yield monkeypatch


def run(monkeypatch, line):
    if line.startswith("python train.py"):
        line = f"{line} {CUT}"
    if "train.py --dataset folder" in line:
        line += " --recipe small --crop 64 --base 64"
        if "--teacher-weights" not in line:  # the recipe downloads ImageNet weights
            line += " --teacher-weights none"
    _, script, *words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [script, *words])
    SCRIPTS[script]()


def test_every_command_and_every_python_block_runs_in_order(as_a_user, capsys):
    names = {}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S):
        if language == "python":
            if "path/to/export" in block:  # it fills the folder of the later commands
                block = block.replace("path/to/data", "path/to/split")
            exec(compile(block, "a page", "exec"), names)
        for line in commands(block) if language == "bash" else ():
            if line not in NOT_RUN:
                run(as_a_user, line)
    text = capsys.readouterr().out
    for said in ("gain of student c2vkd over student alone", "gain over ce", "0 faulty", "80])"):
        assert said in text, said
    run(as_a_user, "python data.py --dataset folder --data path/to/split")  # labels of colours
    assert "train: 14 images, val: 3 images, test: 3 images" in capsys.readouterr().out
    for folder in "from_zero", "two_classes":
        assert np.array(Image.open(f"path/to/{folder}/labels/a.png")).tolist() == [[0, 1]]
    assert len(list(Path("path/to/more/labels/train").glob("more*.png"))) == 3  # masks
    assert not Path("runs-more/folder/teacher-deeplabv3_mobilenet_v2").exists()  # it was given

    run(as_a_user, "python train.py --method hint")
    run(as_a_user, "python train.py --method deep_hint")
    own = torch.load("runs/shapes/deep_hint-mit_nano-seed0/last.pt", weights_only=True)["module"]
    assert any(name.startswith("heads.own.") for name in own)

    net = SimpleNamespace(
        encoder=Encoder(nn.Conv2d(3, 256 * 2 ** i, 1, 8) for i in range(4)),
        decoder=nn.Sequential(nn.Conv2d(2048, 256, 1)), segmentation_head=[nn.Conv2d(256, 3, 1)])
    kind = teacher.TEACHERS["smp_resnet50"]
    teacher.TEACHERS["smp_resnet50"] = replace(kind, build=lambda _: names["FromSMP"](net))
    outputs = teacher.Teacher("smp_resnet50", 3).eval()(torch.randn(2, 3, 64, 64))
    assert outputs.logits.shape == (2, 3, 8, 8) and outputs.feature.shape == (2, 2048, 8, 8)
    assert [x.shape[1] for x in outputs.earlier] == [256, 512, 1024]

    for log in Path("runs").rglob("log.csv"):
        for column in log.read_text().splitlines()[0].split(","):
            term = re.sub("^(raw|grad)_.*", r"\1_TERM", column)
            assert f"`{term}`" in TEXT, column
