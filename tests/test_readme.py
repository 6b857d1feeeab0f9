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
import student
import train

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
CUT = "--teacher-steps 2 --pool-steps 2 --steps 4 --batch-size 2 --log-every 2".split()
NOT_RUN = {"python -m pytest": "it is what runs this test", "python -m tests.benchmark": "it takes minutes and asserts nothing"}
SCRIPTS = {"train.py": train.main, "evaluate.py": evaluate.main, "data.py": data.main}


def commands():
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
    return [line.removeprefix("pip install -r requirements.txt && ") for block in blocks for line in block.strip().splitlines()]


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
    own_data(tmp_path / "path/to/data")
    Image.new("RGB", (50, 40), "olive").save(tmp_path / "path/to/photo.jpg")
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_every_command_and_the_python_block_run_in_order(as_a_user, monkeypatch, capsys):
    ran = []
    for line in commands():
        if line in NOT_RUN:
            continue
        _, script, *words = shlex.split(line)
        if script == "student.py":
            assert student.VARIANTS  # run as a script by the tests of the models
            continue
        monkeypatch.setattr(sys, "argv", [script, *words, *(CUT if script == "train.py" else [])])
        SCRIPTS[script]()
        ran.append(script)
    assert ran.count("train.py") == 6 and ran.count("evaluate.py") == 4 and ran.count("data.py") == 1
    printed = capsys.readouterr().out
    assert "gain over ce" in printed and "0 faulty" in printed and "student c2vkd mit_nano" in printed
    assert Path("overlays/photo.png").is_file() and Path("student.pt2").is_file()

    block, = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "torch.Size([1, 96, 128])"

    for log in Path("runs").rglob("log.csv"):
        for column in log.read_text().splitlines()[0].split(","):
            assert f"`{re.sub('_(pdd|gb|pc|lc|ce|kd|bce)$', '_TERM', column)}`" in README, column


def test_every_block_has_a_language_that_is_accounted_for():
    assert set(re.findall(r"^```(\w+)\n", README, re.M)) <= {"bash", "python", "text"}
    assert set(NOT_RUN) <= set(commands())


def test_the_first_command_again_prints_the_table_without_training(as_a_user, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *CUT])
    train.main()
    first = capsys.readouterr().out
    files = {p: p.read_bytes() for p in Path("runs").rglob("*.pt")}
    train.main()
    again = capsys.readouterr().out
    assert first.split("IoU of each class")[1] == again.split("IoU of each class")[1] and "expected:" not in again
    assert {p: p.read_bytes() for p in Path("runs").rglob("*.pt")} == files
