"""Whole runs on a data set of a few pictures, and what surrounds the loop."""
import argparse
import csv
import json
import signal

import pytest
import torch

import data as data_module
import losses
import train
from data import InputError, spread

TINY = ("--crop 32 --base 32 --batch-size 2 --teacher-steps 2 --pool-steps 2 --steps 3 --log-every 2 "
        "--val-every 10 --gpus 0").split()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train as main does on six drawn pictures; returns the options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_module, "SHAPES_COUNT", {"train": 4, "val": 2, "test": 2})
    monkeypatch.setattr(train.Stop, "listen", lambda: None)

    def train_with(*options):
        args = train.parse_options([*TINY, *options])
        args.rank, args.processes, args.device = 0, 1, torch.device("cpu")
        train.train(args)
        return args

    return train_with


@pytest.mark.parametrize("total, count, wanted", [(10, 3, [0, 3, 6]), (2, 5, [0, 1]), (3, None, [0, 1, 2]), (500, 2, [0, 250])])
def test_validation_images_are_spread_over_the_split(total, count, wanted):
    assert spread(total, count) == wanted


@pytest.mark.parametrize("method", losses.METHODS)
def test_every_method_trains_and_logs_its_terms(run, method, tmp_path):
    run("--method", method)
    folder = tmp_path / "runs/shapes" / f"{method}-mit_nano-seed0"
    rows = list(csv.DictReader(open(folder / "log.csv")))
    assert [int(r["step"]) for r in rows] == [0, 2, 3]
    weights = losses.METHODS[method]
    for row in rows[1:]:
        assert float(row["total"]) == pytest.approx(sum(w * float(row[f"raw_{n}"]) for n, w in weights.items()), rel=1e-4)
        assert all(float(row[f"raw_{n}"]) >= -1e-6 for n in weights)
    assert json.loads((folder / "options.json").read_text())["method"] == method


def test_a_given_teacher_needs_no_stage_one(run, capsys, tmp_path):
    run("--method", "teacher")
    given = tmp_path / "runs/shapes/teacher-deeplabv3_resnet10/last.pt"
    run("--method", "teacher", "--teacher-weights", str(given), "--out", "elsewhere")
    assert "teacher deeplabv3_resnet10" in capsys.readouterr().out
    assert not (tmp_path / "elsewhere/shapes/teacher-deeplabv3_resnet10/last.pt").exists()
    with pytest.raises(InputError, match="holds deeplabv3_resnet10 .* wanted deeplabv3_mobilenet_v3_large"):
        run("--teacher-weights", str(given), "--teacher", "deeplabv3_mobilenet_v3_large", "--out", "third")
    torch.save(torch.load(given) | {"step": 1}, tmp_path / "begun.pt")
    with pytest.raises(InputError, match="begun.pt: trained for 1 of its 2 steps; finish it"):
        run("--teacher-weights", str(tmp_path / "begun.pt"), "--out", "fourth")


def test_a_refused_command_leaves_the_finished_runs_options_alone(run, tmp_path):
    run("--method", "ce")
    options = tmp_path / "runs/shapes/ce-mit_nano-seed0/options.json"
    before = options.read_text()
    with pytest.raises(InputError, match=r"lr \(there 0.001, here 0.5\)"):
        run("--method", "ce", "--lr", "0.5")
    assert options.read_text() == before


def test_unlogged_steps_come_back_on_the_device_of_the_run(tmp_path):
    module = torch.nn.Linear(1, 1)
    stage = train.Stage("student", tmp_path, module, None, {"ce": 1.0}, torch.optim.AdamW(module.parameters()), 9, 1.0, {})
    args = argparse.Namespace(rank=0, seed=0, device=torch.device("cpu"))
    train.resume(stage, args)
    train.save(stage, args, 5, 0, 1.0, [(5, ["a.png"], torch.ones(1), {})])
    args.device = torch.device("meta")
    _, _, _, pending = train.resume(stage, args)
    assert pending[0][2].device.type == "meta"


def test_a_second_signal_stops_at_once(monkeypatch):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(train.Stop, "asked", False)
    try:
        train.Stop.listen()
        signal.raise_signal(signal.SIGTERM)
        assert train.Stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("options", [["--method", "ce", "--kl", "reverse"], ["--method", "kd", "--clip", "RN101.pt"]])
def test_options_that_a_method_would_ignore_are_refused(options):
    with pytest.raises(InputError, match="goes with --method c2vkd"):
        train.parse_options(options)
