"""Every command and every block of Python in the README runs, in its order, with few steps."""
import re
import shlex
import signal
import sys
from pathlib import Path

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
README = (ROOT / "README.md").read_text(encoding="utf-8")
DETAILS = (ROOT / ".github/DETAILS.md").read_text(encoding="utf-8")
CUT = "--teacher-steps 2 --pool-steps 2 --steps 4 --batch-size 2 --log-every 2".split()
NOT_RUN = ("pip install -r requirements.txt",
           "python -m pytest",  # it is what runs this test
           "python train.py --dataset ade20k --gpus 1")  # it downloads a gigabyte and wants a GPU
SCRIPTS = {"train.py": train.main, "evaluate.py": evaluate.main, "data.py": data.main}


def blocks():
    return re.findall(r"^```(\w+)\n(.*?)^```", README + DETAILS, re.M | re.S)


def draw_own_data(root):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("unlabelled", 3)):
        for kind, shape, high in (("images", (48, 64, 3), 256), ("labels", (48, 64), 2)):
            if (kind, split) == ("labels", "unlabelled"):
                continue
            (root / kind / split).mkdir(parents=True)
            for i in range(count):
                path = root / kind / split / f"{split}{i}.{'jpg' if kind == 'images' else 'png'}"
                Image.fromarray(rng.integers(0, high, shape, dtype=np.uint8)).save(path)
    (root / "classes.txt").write_text("dark 0 0 0\nlight 255 255 255\n")


def draw_export(root):
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (root / folder).mkdir(parents=True)
        for i in range(20):
            picture = Image.new("RGB", (64, 48))
            picture.paste((9, 0, 9), (0, 0, 32, 48))
            picture.save(root / folder / f"frame{i:02d}.{ending}")
    labelmap = "# label:color_rgb:parts:actions\nroad:0,0,0::\ncar:9,0,9::\n"
    (root / "labelmap.txt").write_text(labelmap)


@pytest.fixture
def as_a_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 8, "val": 2, "test": 2})
    for table, name in ((losses.METHODS, "hint"), (teacher.TEACHERS, "smp_resnet50")):
        monkeypatch.setitem(table, name, None)  # what the README adds is gone afterwards
        del table[name]
    draw_own_data(tmp_path / "path/to/data")
    draw_export(tmp_path / "path/to/export")
    Image.new("RGB", (50, 40), "olive").save(tmp_path / "path/to/photo.jpg")
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(monkeypatch, line, *more):
    _, script, *words = shlex.split(line)
    if script == "train.py":
        more += tuple(CUT)
    if script == "train.py" and "folder" in words:
        more += ("--recipe", "small", "--crop", "64", "--base", "64")
        if "--teacher-weights" not in words:  # the recipe downloads ImageNet weights
            more += ("--teacher-weights", "none")
    monkeypatch.setattr(sys, "argv", [script, *words, *more])
    SCRIPTS[script]()


class StandIn(nn.Module):
    """The parts of segmentation_models_pytorch's DeepLabV3 by their names and shapes."""

    class Decoder(nn.Module):  # no Sequential in its newer versions
        def __init__(self):
            super().__init__()
            self.aspp = nn.Conv2d(2048, 256, 1)
            self.conv = nn.Conv2d(256, 256, 3, padding=1)
            self.bn = nn.BatchNorm2d(256)
            self.relu = nn.ReLU()

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2048, 3, 8, 1)

        def forward(self, x):
            return [x, self.conv(x)]

    def __init__(self, classes):
        super().__init__()
        self.encoder = self.Encoder()
        self.decoder = self.Decoder()
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(256, classes, 1), nn.UpsamplingBilinear2d(scale_factor=8), nn.Identity())


def test_every_command_and_every_python_block_run_in_order(as_a_user, capsys):
    printed, names = {}, {}
    for language, block in blocks():
        if language == "python":
            if "path/to/export" in block:  # it fills the folder of the later commands
                block = block.replace("path/to/data", "path/to/split")
            exec(compile(block, "README.md", "exec"), names)
        elif language == "bash":
            for line in block.strip().splitlines():
                if line not in NOT_RUN:
                    run(as_a_user, line)
        printed[block] = capsys.readouterr().out
    text = "".join(printed.values())
    for said in ("gain over ce", "0 faulty", "student c2vkd", "torch.Size([1, 64, 80])"):
        assert said in text, said
    split = Path("path/to/split")
    counts = [len(list(split.glob(f"labels/{name}/*.png"))) for name in data.SHAPES_COUNT]
    assert counts == [14, 3, 3]
    for kind in "images", "labels":  # the teacher's masks became labels
        assert len(list(Path(f"path/to/more/{kind}/train").iterdir())) == 4 + 3
    assert not Path("runs-more/folder/teacher-deeplabv3_mobilenet_v2").exists()  # it was given
    run(as_a_user, "python data.py --convert path/to/new --dataset folder --data path/to/split")
    assert len(list(Path("path/to/new/images/test").iterdir())) == 3
    assert len(list(Path("overlays").iterdir())) == len(list(Path("masks").iterdir())) == 1

    first = next(out for block, out in printed.items() if "\npython train.py\n" in block)
    files = {path: path.read_bytes() for path in Path("runs").rglob("*.pt")}
    run(as_a_user, "python train.py")  # again: it prints the table and trains nothing
    again = capsys.readouterr().out
    assert first.split("IoU of each class")[1] == again.split("IoU of each class")[1]
    assert {path: path.read_bytes() for path in Path("runs").rglob("*.pt")} == files

    run(as_a_user, "python train.py --method hint")  # the loss that the README adds
    assert "\nstudent hint " in capsys.readouterr().out

    as_a_user.setitem(names, "build", lambda classes: names["FromSMP"](StandIn(classes)))
    adapter = names["build"](3)
    kind = teacher.Kind(names["build"], teacher.TEACHERS["smp_resnet50"].channels)
    as_a_user.setitem(teacher.TEACHERS, "smp_resnet50", kind)
    outputs = teacher.Teacher("smp_resnet50", 3).eval()(torch.randn(2, 3, 64, 64))
    assert outputs.logits.shape == (2, 3, 8, 8) and outputs.feature.shape == (2, 2048, 8, 8)
    assert {name.split(".")[0] for name in adapter.state_dict()} == {"backbone", "classifier"}

    for log in Path("runs").rglob("log.csv"):
        for column in log.read_text().splitlines()[0].split(","):
            term = re.sub("_(pdd|gb|pc|lc|ce|kd|dist|bce|hint)$", "_TERM", column)
            assert f"`{term}`" in DETAILS, column


def test_every_method_of_the_code_is_in_the_table_with_its_weights():
    for name, method in losses.METHODS.items():
        row = next(line for line in DETAILS.splitlines() if line.startswith(f"| `{name}` |"))
        for term, weight in method.weights.items():
            assert re.search(rf"\b{term} {weight:g}\b", row), (name, term)
