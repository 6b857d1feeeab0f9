"""Whole runs on a data set of a few pictures, and what surrounds the loop."""
import csv
import json
import signal

import pytest
import torch

import data as data_module
import evaluate
import losses
import teacher
import train
from data import InputError, spread

TINY = ("--crop 32 --base 32 --batch-size 2 --teacher-steps 2 --pool-steps 2 --steps 3 --log-every 2 "
        "--val-every 10 --gpus 0").split()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train as main does on six drawn pictures; returns the options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_module, "SHAPES_COUNT", {"train": 4, "val": 2, "test": 2})

    def train_with(*options):
        args = train.parse_options([*TINY, *options])
        args.rank, args.processes, args.device = 0, 1, torch.device("cpu")
        train.train(args)
        return args

    return train_with


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Options of one place for the data and for one teacher, which is trained by whichever test comes first."""
    folder = tmp_path_factory.mktemp("shared")
    return ["--data", str(folder / "data"), "--out", str(folder / "runs")]


def rows_of(folder):
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("total, count, wanted", [(10, 3, [0, 3, 6]), (2, 5, [0, 1]), (3, None, [0, 1, 2]), (500, 2, [0, 250])])
def test_validation_images_are_spread_over_the_split(total, count, wanted):
    assert spread(total, count) == wanted


# ---------------------------------------------------------------- methods

@pytest.mark.parametrize("method", losses.METHODS)
def test_every_method_trains_and_logs_its_terms(run, shared, method):
    args = run("--method", method, *shared)
    folder, weights = train.Path(args.out) / f"shapes/{method}-mit_nano-seed0", losses.METHODS[method].weights
    rows = rows_of(folder)
    assert [int(r["step"]) for r in rows] == [0, 2, 3]
    for row in rows[1:]:
        assert float(row["total"]) == pytest.approx(sum(w * float(row[f"raw_{n}"]) for n, w in weights.items()), rel=1e-4)
        assert all(float(row[f"raw_{n}"]) >= -1e-6 for n in weights)
    assert json.loads((folder / "options.json").read_text())["method"] == method


def test_a_new_loss_is_one_function_and_one_entry(run, shared, monkeypatch):
    def mine(S, T, labels):
        return losses.ce(S, T, labels) | {"mine": (S.projected.mean() - T.feature.mean()).square()}

    monkeypatch.setitem(losses.METHODS, "mine", losses.Method(mine, {"ce": 1.0, "mine": 2.0}, "teacher A_v"))
    args = run("--method", "mine", "--weights", "mine=3", *shared)
    row = rows_of(train.Path(args.out) / "shapes/mine-mit_nano-seed0")[-1]
    assert float(row["weighted_mine"]) == pytest.approx(3 * float(row["raw_mine"]), rel=1e-4) and float(row["grad_mine"]) > 0


def test_cross_entropy_needs_no_teacher_and_is_compared_with_the_others(run, tmp_path, capsys):
    run("--method", "ce")
    runs = tmp_path / "runs/shapes"
    assert sorted(p.name for p in runs.iterdir()) == ["ce-mit_nano-seed0"]
    text = capsys.readouterr().out
    assert "stages: student mit_nano, ce: 3 steps\n" in text
    assert "student alone" in text and "gain of" not in text
    run("--method", "c2vkd")
    miou = {m: json.loads((runs / f"{m}-mit_nano-seed0/results-val.json").read_text())["miou"] for m in ("ce", "c2vkd")}
    gain = miou["c2vkd"] - miou["ce"]
    assert f"gain of student c2vkd over student alone: {gain:+.2f} mIoU on val" in capsys.readouterr().out
    _, rows = evaluate.compare(runs, "val")
    assert {r["method"]: r["gain"] for r in rows} == {"ce": None, "c2vkd": pytest.approx(gain)}


def test_a_student_alone_of_other_conditions_is_not_in_the_table(run, shared, capsys):
    run("--method", "ce", *shared)
    for options, shown in ((("--steps", "2", "--name", "shorter"), False), (("--name", "alike"), True)):
        capsys.readouterr()
        run("--method", "deit", *options, *shared)
        assert ("student alone" in capsys.readouterr().out) == shown


def test_the_first_command_trains_teacher_and_both_students_and_prints_the_gain(run, tmp_path, monkeypatch, capsys):
    started, batches, stream = {}, {}, train.Run.batches

    def recording(self, *unlabelled):
        name = self.folder.name.split("-")[0]
        if self.stage == "student":
            started[name] = {k: v.clone() for k, v in self.network.state_dict().items()}
        for step, images, labels in stream(self, *unlabelled):
            batches.setdefault(name, []).append((images, labels))
            yield step, images, labels

    monkeypatch.setattr(train.Run, "batches", recording)
    run()
    text = capsys.readouterr().out
    runs = tmp_path / "runs/shapes"
    assert sorted(p.name for p in runs.iterdir()) == ["c2vkd-mit_nano-seed0", "ce-mit_nano-seed0", "teacher-deeplabv3_resnet10"]
    for line in ("shapes: 4 training and 2 validation images, 8 classes; recipe shapes; seed 0; device cpu",
                 "stages: teacher deeplabv3_resnet10: 2 steps; pool: 2 steps; student mit_nano, alone: 3 steps; "
                 "student mit_nano, c2vkd: 3 steps", "gain of student c2vkd over student alone: "):
        assert line in text
    head = [line.split("  ")[0] for line in text.splitlines() if line.startswith(("teacher   ", "student alone  ", "student c2vkd  "))]
    assert head == ["teacher", "student alone", "student c2vkd"]
    for name in ("comparison.png", "curves.png"):
        assert (runs / "c2vkd-mit_nano-seed0" / name).stat().st_size > 1000

    assert started["ce"].keys() == started["c2vkd"].keys()
    assert all(torch.equal(v, started["c2vkd"][k]) for k, v in started["ce"].items())
    assert len(batches["ce"]) == len(batches["c2vkd"]) == 3
    assert all(torch.equal(a, b) for one, other in zip(batches["ce"], batches["c2vkd"]) for a, b in zip(one, other))

    result = runs / "teacher-deeplabv3_resnet10/results-val.json"
    for miou, passed in ((0, 2), (100, 0)):
        result.write_text(json.dumps(json.loads(result.read_text()) | {"miou": miou}))
        run()  # finished: it reads its results and prints them
        assert capsys.readouterr().out.count("has passed its teacher") == passed


# ---------------------------------------------------------------- given teachers and recipes

def test_a_given_teacher_needs_no_stage_one(run, capsys, tmp_path):
    run("--method", "teacher")
    given = tmp_path / "runs/shapes/teacher-deeplabv3_resnet10/last.pt"
    capsys.readouterr()
    run("--method", "teacher", "--teacher-weights", str(given), "--out", "elsewhere")
    text = capsys.readouterr().out
    assert "teacher deeplabv3_resnet10" in text and "IoU of each class" in text and "stages: teacher" not in text
    assert not (tmp_path / "elsewhere/shapes/teacher-deeplabv3_resnet10/last.pt").exists()
    with pytest.raises(InputError, match="holds deeplabv3_resnet10 .* wanted deeplabv3_mobilenet_v3_large"):
        run("--teacher-weights", str(given), "--teacher", "deeplabv3_mobilenet_v3_large", "--out", "third")
    torch.save(torch.load(given) | {"step": 1}, tmp_path / "begun.pt")
    with pytest.raises(InputError, match="begun.pt: trained for 1 of its 2 steps; finish it"):
        run("--teacher-weights", str(tmp_path / "begun.pt"), "--out", "fourth")


def test_a_teacher_trained_elsewhere_is_read_from_a_plain_state_dict(run, capsys, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = teacher._resnet10(8)
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}  # old files lack them
    torch.save(state | {"aux_classifier.0.weight": torch.zeros(1)}, tmp_path / "mine.pth")
    for lowest, warned in ((100.0, 1), (-1.0, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(train, "commonest", lambda matrix: lowest)
            args = run("--method", "kd", "--teacher-weights", str(tmp_path / "mine.pth"))
        text = capsys.readouterr().out
        assert text.count("WARNING: this teacher is no better than always answering the commonest class") == warned
        assert "mine.pth; not loaded: 1 tensors aux_classifier" in text
        names = [line.split()[0] for line in text.partition("IoU of each class, %")[2].splitlines()[1:9]]
        assert names == data_module.SHAPES
    found = train.given_teacher(args, data_module.open_dataset("shapes"))
    assert not any(p.requires_grad for p in found.parameters()) and not found.training
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in state.items())
    assert not list(tmp_path.rglob("teacher-*/last.pt"))
    torch.save(teacher._resnet10(3).state_dict(), tmp_path / "three.pth")
    with pytest.raises(InputError, match="three.pth: not deeplabv3_resnet10 with the classes of this data set: 2 tensors"):
        run("--teacher-weights", str(tmp_path / "three.pth"))


@pytest.mark.parametrize("gpus, recipe", [(0, "small"), (1, "full")])
def test_the_recipe_of_own_data_follows_the_machine_and_is_printed(tmp_path, monkeypatch, capsys, gpus, recipe):
    monkeypatch.setattr(data_module, "SHAPES_COUNT", {"train": 1, "val": 1})
    data_module.make_shapes(tmp_path / "data")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    args = train.parse_options(["--dataset", "folder", "--data", str(tmp_path / "data")])
    args.device = torch.device("cpu")
    train.announce(args, data_module.open_dataset("folder", args.data), "teacher", None, [])
    assert f"recipe {recipe};" in capsys.readouterr().out
    assert args.gpus == gpus and args.crop == train.RECIPES[recipe]["crop"]


# ---------------------------------------------------------------- around the loop

def test_a_refused_command_leaves_the_finished_runs_options_alone(run, tmp_path):
    run("--method", "ce")
    options = tmp_path / "runs/shapes/ce-mit_nano-seed0/options.json"
    before = options.read_text()
    with pytest.raises(InputError, match=r"lr \(there 0.001, here 0.5\)"):
        run("--method", "ce", "--lr", "0.5")
    assert options.read_text() == before


def test_a_second_signal_stops_at_once(monkeypatch, capsys):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(train.Run, "stop", False)
    try:
        train.listen()
        signal.raise_signal(signal.SIGTERM)
        assert train.Run.stop
        assert "stopping after the next row of the log" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("options", [["--method", "ce", "--kl", "reverse"], ["--method", "kd", "--clip", "RN101.pt"]])
def test_options_that_a_method_would_ignore_are_refused(options):
    with pytest.raises(InputError, match="goes with --method c2vkd"):
        train.parse_options(options)
