"""Two processes are one: same gradients, same scores, same stream, same files; and who starts them."""
import copy
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

import data
import losses
import train
from data import InputError
from evaluate import evaluate
from student import Student
from teacher import AttentionPool, Teacher

multiprocessing.set_forkserver_preload(["train"])  # torch is imported once, for all children

# dist is left out: its correlations run over the labelled pixels of one process, so it is an approximation
EXACT = [(m, "forward") for m in losses.METHODS if m != "dist"] + [("c2vkd", "reverse")]


def arguments(rank=0, processes=1, *more):
    args = train.parse_options(["--dataset", "folder", "--gpus", "0", "--teacher", "deeplabv3_resnet10", "--student", "mit_nano",
                                "--crop", "32", "--base", "32", "--batch-size", "4", *map(str, more)])
    args.rank, args.processes, args.device = rank, processes, torch.device("cpu")
    return args


def child(rank, processes, folder, task, more, rest):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    torch.save(task(arguments(rank, processes, *more), *rest), folder / f"{rank}.pt")
    dist.destroy_process_group()


def two(folder, task, *rest, more=()):
    """What `task(args, *rest)` returns in each of two processes."""
    children = start_processes(child, (2, folder, task, more, rest), 2, join=False, start_method="forkserver")
    try:
        assert children.join(60) or children.join(20), "a process hangs"
    finally:
        for process in children.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 + 5 drawn pictures in the layout of `folder`."""
    root = tmp_path_factory.mktemp("data") / "pictures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_COUNT", {"train": 12, "val": 5})
        data.make_shapes(root)
    return root


# ---------------------------------------------------------------- gradients

class OneStep:
    """In place of train.Run: one step on this process's share of a batch, without dropout; keeps what it left."""

    def __init__(self, args, batch, module):
        self.args, self.batch, self.module = args, batch, module.eval()

    def batches(self, _):
        # one method's norms, measured in step 0, are enough: each is a backward pass
        yield int(self.args.method != "c2vkd"), *self.batch

    def set_rate(self, factor):
        pass

    def log(self, terms, norms):
        self.gradients = torch.cat([p.grad.flatten() for p in self.module.parameters() if p.requires_grad])
        self.terms, self.norms = {name: term.item() for name, term in terms.items()}, norms


def gradients(args, images, labels):
    """For every method: the gradients of its step in `distil`, its terms and their norms in the report."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(1)
        teacher, pool = Teacher(args.teacher, 5).freeze(), AttentionPool(512, 1).requires_grad_(False)
        mine = slice(args.rank * len(images) // args.processes, (args.rank + 1) * len(images) // args.processes)
        outputs = teacher(images[mine])
        teacher.forward = lambda _: outputs  # once is enough
        nothing, found = SimpleNamespace(classes=list("abcde"), pairs={}), {}
        args.weights, args.student_weights = [], "none"
        student = Student(args.student, 5)
        for args.method, args.kl in EXACT:
            args.term_weights, needs, steps = train.term_weights(args), losses.METHODS[args.method].needs, []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "Run", lambda args, data, stage, module, *_, **__: steps.append(
                    OneStep(args, (images[mine], labels[mine]), module)) or steps[0])
                patch.setattr(train, "Student", lambda *_: copy.deepcopy(student))  # drawn once
                train.distil(args, nothing, teacher if needs else None, pool if "A_l" in needs else None)
            found[f"{args.method} {args.kl}"] = steps[0].gradients, steps[0].terms, steps[0].norms
        return found
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Gradients of one process and of two, on a batch whose halves have very different numbers of labelled pixels."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    labels = torch.randint(0, 5, (4, 8, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[0] = labels[1, 10:] = labels[3, :3] = data.IGNORE
    valid = (labels != data.IGNORE).flatten(1).sum(1)
    assert 5 * valid[:2].sum() < valid[2:].sum()
    return gradients(arguments(), images, labels), two(tmp_path_factory.mktemp("gradients"), gradients, images, labels)


@pytest.mark.parametrize("name", [" ".join(m) for m in EXACT])
def test_the_gradient_of_two_processes_is_that_of_one(both, name):
    alone, together = both
    (expected, terms, norms), scale = alone[name], alone[name][0].abs().max()
    assert scale > 0 and terms.keys() == losses.METHODS[name.split()[0]].weights.keys()
    assert norms.keys() == (terms.keys() if name.startswith("c2vkd") else set())
    for found, _, found_norms in (t[name] for t in together):
        assert (found - expected).abs().max() < 1e-9 * scale
        assert found_norms == pytest.approx(norms, rel=1e-9, abs=1e-12)  # the term report too
    for term in terms:  # what the log shows: the mean over processes
        shown = [t[name][1][term] for t in together]
        assert sum(shown) / 2 == pytest.approx(terms[term], rel=1e-9)


# ---------------------------------------------------------------- evaluation and the data stream

def matrices(args, folder):
    torch.manual_seed(0)
    model = Student("mit_nano", 8).eval()
    pictures = data.open_dataset("folder", folder)
    return [evaluate(model, pictures, "val", 32, 32, args.device, images=n) for n in (None, 4, 1)]


def test_evaluation_counts_every_image_once(folder, tmp_path):
    alone = matrices(arguments(), folder)
    pictures = data.open_dataset("folder", folder)
    assert len(pictures.pairs["val"]) == 5
    assert alone[0].sum() == sum((pictures.read("val", i)[1] != data.IGNORE).sum() for i in range(5))
    for found in two(tmp_path, matrices, folder):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("unlabelled", [0, 1])
def test_the_processes_share_one_stream(folder, tmp_path, unlabelled):
    pictures = data.open_dataset("folder", folder)
    pictures.pairs["unlabelled"] = [(image, None) for image, _ in pictures.pairs["val"]]

    def batches(*who):
        module = torch.nn.Linear(1, 1)
        args = arguments(*who, "--teacher-steps", 6, "--out", tmp_path / str(who))
        run = train.Run(args, pictures, "teacher", module, torch.optim.AdamW(module.parameters()))
        run.step = 1  # continued
        return [batch for _, *batch in run.batches(unlabelled)]

    alone, *shares = batches(0, 1), batches(0, 2), batches(1, 2)
    assert len(alone) == 5 and len({image.sum().item() for images, _ in alone for image in images}) == 20
    for (images, labels), *parts in zip(alone, *shares, strict=True):
        assert torch.equal(torch.cat([p[0] for p in parts]), images)
        assert torch.equal(torch.cat([p[1] for p in parts]), labels)
        assert (labels[-1] == data.IGNORE).all() == bool(unlabelled)


# ---------------------------------------------------------------- whole runs

def settings(folder, out):
    return ["--data", folder, "--out", out, "--teacher-steps", 2, "--pool-steps", 2, "--steps", 2, "--log-every", 1,
            "--report-every", 1, "--val-every", 9]


def whole_run(args):
    """Train; returns the files that this process wrote or renamed."""
    written = set()

    def watch(event, detail):
        if event == "open" and isinstance(detail[0], (str, os.PathLike)) and detail[2] & (os.O_WRONLY | os.O_RDWR) \
                or event == "os.rename":
            written.add(os.path.basename(detail[0]))

    sys.addaudithook(watch)
    train.train(args)
    return sorted(written)


def test_one_process_alone_writes_and_leaves_the_files_of_a_single_run(folder, tmp_path):
    train.train(arguments(0, 1, *settings(folder, tmp_path / "one")))
    first, second = two(tmp_path, whole_run, more=settings(folder, tmp_path / "two"))
    assert {"last.pt.part", "results-val.json.part", "log.csv", "options.json.part", "comparison.png", "curves.png"} <= set(first)
    assert [f for f in second if f.endswith((".pt", ".json", ".csv", ".png", ".part"))] == []
    one, other = (sorted(str(p.relative_to(tmp_path / n)) for p in (tmp_path / n).rglob("*")) for n in ("one", "two"))
    assert one == other
    assert sum(p.endswith("results-val.json") for p in other) == 2  # the teacher's and the student's


def nan_in_the_second(args):
    step, cross_entropy = iter(range(100)), losses.cross_entropy
    losses.cross_entropy = lambda *a: cross_entropy(*a) * (torch.nan if args.rank == 1 and next(step) == 1 else 1)
    with pytest.raises(InputError, match="teacher, step 2 of seed 0: a loss.* not finite"):
        train.train(args)
    return os.path.exists(f"{args.out}/folder/teacher-{args.teacher}/last.pt")


def test_what_is_not_finite_in_one_process_stops_all_before_anything_is_saved(folder, tmp_path):
    found = two(tmp_path, nan_in_the_second, more=settings(folder, tmp_path / "out"))
    assert found == [False, False]


def run_without_seeing(args):
    """Train where process 1 sees no checkpoint yet, as on a slow network file system; returns where each stage began."""
    begun, resumed, exists = [], train.Run.resume, Path.exists
    train.Run.resume = lambda run: (resumed(run), begun.append((run.stage, run.step)))
    Path.exists = lambda path: exists(path) and (args.rank == 0 or path.name != "last.pt")
    train.train(args)
    return begun, [train.agreed(args.rank == 0), train.agreed(args.rank == 1)]


def test_process_0_alone_looks_for_a_checkpoint_and_tells_the_other(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Run, "stop", True)
    with pytest.raises(KeyboardInterrupt, match="teacher: stopped and saved at step 1"):
        train.train(arguments(0, 1, *settings(folder, tmp_path / "out")))
    found = two(tmp_path, run_without_seeing, more=settings(folder, tmp_path / "out"))
    assert found == [([("teacher", 1)], [True, False])] * 2
    assert (tmp_path / "out/folder/c2vkd-mit_nano-seed0/results-val.json").exists()


# ---------------------------------------------------------------- who starts the processes

@pytest.fixture
def started(monkeypatch):
    """train.main without its work: what it asked for."""
    calls = SimpleNamespace(call=[], group=[], listen=[], args=None)

    def replaced(program, command):
        calls.call.append((program, command))
        raise SystemExit(3)  # the process is theirs from here on

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(os, "execv", replaced)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: calls.group.append(backend))
    monkeypatch.setattr(train, "train", lambda args: setattr(calls, "args", args))
    monkeypatch.setattr(train, "listen", lambda: calls.listen.append(1))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # these two outlive a test
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return calls


def test_two_gpus_start_two_processes_with_the_same_options(started, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--gpus", "2", "--seed", "5"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 3
    assert started.call == [(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                                              "2", "train.py", "--gpus", "2", "--seed", "5"])]
    assert started.args is None and started.group == []


@pytest.mark.parametrize("gpus, device", [(0, "cpu"), (1, "cuda:0")])
def test_one_process_needs_no_group(started, monkeypatch, gpus, device):
    monkeypatch.setattr(sys, "argv", ["train.py", "--gpus", str(gpus)])
    train.main()
    assert started.call == [] and started.group == [] and not dist.is_initialized()
    assert started.listen == [1]
    assert (started.args.rank, started.args.processes, str(started.args.device)) == (0, 1, device)


@pytest.mark.parametrize("gpus, backend, device", [(0, "gloo", "cpu"), (2, "nccl", "cuda:1")])
def test_a_started_process_joins_its_group(started, monkeypatch, gpus, backend, device):
    monkeypatch.setattr(sys, "argv", ["train.py", "--gpus", str(gpus)])
    for name, value in dict(RANK=3, WORLD_SIZE=4, LOCAL_RANK=1).items():
        monkeypatch.setenv(name, str(value))
    train.main()
    assert started.call == [] and started.group == [backend]
    assert started.listen == []  # several rely on their checkpoints
    assert (started.args.rank, started.args.processes, str(started.args.device)) == (3, 4, device)
