"""Every code block of the README runs, in its order, with its steps cut short."""
import re
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
import losses
import student
import teacher
import train

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
CUT = "--teacher-steps 2 --pool-steps 2 --steps 4 --batch-size 2 --log-every 2".split()
NOT_RUN = {"python -m pytest": "it is what runs this test", "python -m tests.benchmark": "it takes minutes and asserts nothing",
           "python train.py --dataset ade20k --gpus 1": "it downloads a gigabyte and wants a GPU"}
SCRIPTS = {"train.py": train.main, "evaluate.py": evaluate.main, "data.py": data.main}


def blocks():
    return re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)


def commands():
    return [line.removeprefix("pip install -r requirements.txt && ")
            for language, block in blocks() if language == "bash" for line in block.strip().splitlines()]


def own_data(root):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind, mode, high in (("images", (48, 64, 3), 256), ("labels", (48, 64), 2)):
            (root / kind / split).mkdir(parents=True)
            for i in range(count):
                suffix = "jpg" if kind == "images" else "png"
                Image.fromarray(rng.integers(0, high, mode, dtype=np.uint8)).save(root / kind / split / f"{i}.{suffix}")
    (root / "classes.txt").write_text("dark 0 0 0\nlight 255 255 255\n")


@pytest.fixture
def as_a_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 8, "val": 2, "test": 2})
    for table in (losses.METHODS, teacher.TEACHERS):  # what the README adds is gone afterwards
        for name in ("hint", "fcn_resnet50"):
            monkeypatch.setitem(table, name, None)
            del table[name]
    own_data(tmp_path / "path/to/data")
    Image.new("RGB", (50, 40), "olive").save(tmp_path / "path/to/photo.jpg")
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(monkeypatch, line):
    _, script, *words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [script, *words, *(CUT if script == "train.py" else [])])
    SCRIPTS[script]()
    return script


def test_every_command_and_every_python_block_run_in_order(as_a_user, capsys):
    ran, printed = [], []
    for language, block in blocks():
        if language == "python":
            capsys.readouterr()
            exec(compile(block, "README.md", "exec"), {})
            printed.append(capsys.readouterr().out)
        elif language == "bash":
            for line in block.strip().splitlines():
                line = line.removeprefix("pip install -r requirements.txt && ")
                if line not in NOT_RUN:
                    ran.append(run(as_a_user, line))
                    printed.append(capsys.readouterr().out)
    assert ran.count("train.py") == 7 and ran.count("evaluate.py") == 4 and ran.count("data.py") == 1
    text = "".join(printed)
    assert "gain over ce" in text and "0 faulty" in text and "student c2vkd" in text
    assert printed[-1].strip() == "torch.Size([1, 64, 64]) ground"
    assert Path("overlays/photo.png").is_file() and Path("student.pt2").is_file()

    run(as_a_user, "python train.py --method hint")
    run(as_a_user, "python train.py --method hint --teacher fcn_resnet50 --out fcn")
    assert capsys.readouterr().out.count("\nstudent hint ") == 2  # a row of each table

    for log in Path("runs").rglob("log.csv"):
        for column in log.read_text().splitlines()[0].split(","):
            assert f"`{re.sub('_(pdd|gb|pc|lc|ce|kd|bce|hint)$', '_TERM', column)}`" in README, column


def test_every_block_has_a_language_that_is_accounted_for():
    assert {language for language, _ in blocks()} <= {"bash", "python", "text"}
    assert student.VARIANTS.keys() >= {"mit_nano", "mit_b0"}
    assert all(line in commands() or f"`{line}`" in README for line in NOT_RUN)


def test_every_method_of_the_code_is_in_the_table_with_its_weights():
    for name, method in losses.METHODS.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
        for term, weight in method.weights.items():
            assert re.search(rf"\b{term} {weight:g}\b", row), (name, term)


def test_the_first_command_again_prints_the_table_without_training(as_a_user, capsys):
    run(as_a_user, "python train.py")
    first = capsys.readouterr().out
    files = {p: p.read_bytes() for p in Path("runs").rglob("*.pt")}
    run(as_a_user, "python train.py")
    again = capsys.readouterr().out
    assert first.split("IoU of each class")[1] == again.split("IoU of each class")[1]
    assert {p: p.read_bytes() for p in Path("runs").rglob("*.pt")} == files
