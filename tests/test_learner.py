"""A member that is killed goes on and ends with the same bits: real processes, a real SIGKILL, and every place where it hurts."""
import json
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

CONTEXT = multiprocessing.get_context("forkserver")  # imports fastai once; each child is a process of its own, forked from that
CONTEXT.set_forkserver_preload(["brainmets.train.learner"])
N_TRAIN = 43


class Rows(torch.utils.data.Dataset):
    "Rows; the augmented ones draw from numpy's global generator and call `on_row` with the number of rows read."
    def __init__(self, seed, n, on_row=None):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(n, 4)).astype(np.float32)
        self.y = (self.x @ np.array([2., -1., 1., 0.]) + 0.3*rng.normal(size=n)).astype(np.float32)
        self.on_row, self.n_read = on_row, 0

    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        noise = np.zeros(4, np.float32)
        if self.on_row:
            self.n_read += 1
            self.on_row(self.n_read)
            noise = 0.1*np.random.normal(size=4).astype(np.float32)
        return torch.from_numpy(self.x[i] + noise), torch.tensor([self.y[i], 1.0])


class Spread(nn.Module):
    "A normal likelihood whose spread is learned."
    def __init__(self):
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(1))

    def forward(self, prediction, target):
        return (self.log_sigma + 0.5*((prediction[:, 0] - target[:, 0])/self.log_sigma.exp())**2).mean()


def stop_before_file(name, n, wait):
    "Call `wait` before a file of that name is put in place for the n-th time."
    replace, seen = os.replace, []

    def replace_or_wait(source, target):
        seen.append(os.path.basename(target))
        if seen[-1] == name and seen.count(name) == n: wait()
        return replace(source, target)
    os.replace = replace_or_wait


def fit(folder, on_row, n_workers):
    from brainmets.train.learner import TrainConfig, fit_member, seeded
    torch.set_num_threads(1)
    with seeded(0): model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1))
    config = TrainConfig(epochs=6, batch_size=8, lr=0.02, schedule="one-cycle", patience=6, accumulate=2, clip_norm=5.0, n_workers=n_workers, device="cpu")
    return fit_member(folder, model, Spread(), Rows(1, N_TRAIN, on_row), Rows(2, 20), config, seed=3)


def child(connection, folder, stop, n_workers):
    "Train; at the place `stop` say so and wait for the end."
    multiprocessing.set_start_method("fork", force=True)  # of the workers that read data, as in any other program
    def wait():
        connection.send("here")
        time.sleep(600)
    try:
        if "file" in stop: stop_before_file(*stop["file"], wait)
        history = fit(folder, lambda n: wait() if n == stop.get("row") else None, n_workers)
        connection.send((history.best_epoch, history.stopped))
    except Exception: connection.send(traceback.format_exc())


def start(folder, stop=None, n_workers=0):
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=child, args=(theirs, folder, stop or {}, n_workers))
    process.start()
    assert ours.poll(240), "no word from the child"
    return process, ours.recv()


def finished(folder, **options):
    "What the child says at its end."
    process, said = start(folder, **options)
    process.join(60)
    return said


def killed(folder, stop):
    "Start the child, wait until it is at the place, kill it from outside."
    process, said = start(folder, stop)
    assert said == "here", said
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def results(folder): return {name: (folder/name).read_bytes() for name in ("best.safetensors", "best.json", "history.csv")}


def n_epochs(folder): return len(json.loads((folder/"checkpoint.json").read_text())["rows"]) if (folder/"checkpoint.json").exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The folder of a run that was left alone."
    folder = tmp_path_factory.mktemp("undisturbed")/"member"
    best_epoch, stopped = finished(folder)
    assert stopped == "epochs" and best_epoch == 6, "the weights that are compared must be made after the kill"
    return folder


@pytest.fixture(scope="module")
def stopped_in_epoch_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")/"member"
    killed(folder, {"row": N_TRAIN + 5})
    return folder


PLACES = {
    "first epoch": ({"row": 20}, 0),
    "middle of the third epoch": ({"row": 2*N_TRAIN + 20}, 2),
    "while the second checkpoint is written": ({"file": ("checkpoint-2.safetensors", 1)}, 1),
    "before the second checkpoint counts": ({"file": ("checkpoint.json", 2)}, 1),
    "before the history of the fourth epoch": ({"file": ("history.csv", 4)}, 4),
    "before the last best weights": ({"file": ("best.safetensors", 6)}, 5),
    "between the best weights and their hash": ({"file": ("best.json", 6)}, 5),
    "after all but the last history": ({"file": ("history.csv", 6)}, 6),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_and_called_again_it_ends_with_the_same_bits(place, undisturbed, tmp_path):
    stop, n_finished = PLACES[place]
    killed(tmp_path/"member", stop)
    assert n_epochs(tmp_path/"member") == n_finished
    assert finished(tmp_path/"member")[1] == "epochs"
    assert results(tmp_path/"member") == results(undisturbed)
    assert sorted(p.name for p in (tmp_path/"member").iterdir()) == sorted(p.name for p in undisturbed.iterdir())  # nothing half written is left


def test_killed_twice(undisturbed, tmp_path):
    killed(tmp_path/"member", {"row": N_TRAIN + 5})
    killed(tmp_path/"member", {"row": 2*N_TRAIN + 30})
    assert n_epochs(tmp_path/"member") == 3
    assert finished(tmp_path/"member")[1] == "epochs"
    assert results(tmp_path/"member") == results(undisturbed)


def test_worker_processes_repeat_too(tmp_path):
    for name in ("one", "other"): assert finished(tmp_path/name, n_workers=2)[1] == "epochs"
    assert results(tmp_path/"one") == results(tmp_path/"other")


def test_weights_are_a_header_in_json_and_numbers_and_nothing_else(undisturbed, stopped_in_epoch_two):
    files = [undisturbed/"best.safetensors", *stopped_in_epoch_two.glob("*.safetensors")]
    assert len(files) == 3
    for path in files:
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:8 + length])
        ends = sorted(tuple(t["data_offsets"]) for name, t in header.items() if name != "__metadata__")
        assert ends[0][0] == 0 and ends[-1][1] == len(content) - 8 - length
        assert all(a[1] == b[0] for a, b in zip(ends, ends[1:])), "bytes that belong to no tensor"
    names = {p.suffix for folder in (undisturbed, stopped_in_epoch_two) for p in folder.iterdir() if p.name != ".lock"}
    assert names <= {".safetensors", ".json", ".csv"}


@pytest.mark.parametrize("damage, message", [
    (lambda folder: next(folder.glob("checkpoint-*.safetensors")).write_bytes(b"\x80\x04K\x01."), "damaged or foreign"),
    (lambda folder: next(folder.glob("checkpoint-*.safetensors")).unlink(), "is missing"),
    (lambda folder: (folder/"checkpoint.json").write_text((folder/"checkpoint.json").read_text()[:-20]), "no readable JSON"),
    (lambda folder: (folder/"checkpoint.json").write_text('{"format": "something else"}'), "no checkpoint of brainmets"),
], ids=["a pickle", "missing", "cut", "foreign"])
def test_a_damaged_checkpoint_is_refused(damage, message, stopped_in_epoch_two, tmp_path):
    shutil.copytree(stopped_in_epoch_two, tmp_path/"member")
    damage(tmp_path/"member")
    said = finished(tmp_path/"member")
    assert "DataError" in said and message in said and "Remedy" in said


def test_a_second_process_is_kept_out_until_the_first_is_gone(undisturbed, tmp_path):
    process, said = start(tmp_path/"member", {"row": N_TRAIN + 5})
    assert said == "here"
    try: refused = finished(tmp_path/"member")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    assert "DataError: Another process trains in 'member'" in refused and "Remedy" in refused
    assert finished(tmp_path/"member")[1] == "epochs"
    assert results(tmp_path/"member") == results(undisturbed)


class Plain(torch.utils.data.TensorDataset):
    "Rows of four numbers and [time_days, event]."
    def __init__(self, seed, n):
        rng = np.random.default_rng(seed)
        super().__init__(*(torch.from_numpy(v.astype(np.float32)) for v in (rng.normal(size=(n, 4)), np.stack([np.ceil(rng.exponential(600, n)), rng.random(n) < 0.6], 1))))


def small_fit(folder, config, seed=0, n=40, train=None, **loss_options):
    from brainmets.losses import make_loss
    from brainmets.train.learner import fit_member, seeded
    torch.set_num_threads(1)
    with seeded(seed): model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 1))
    train = train or Plain(0, n)
    name = loss_options.pop("name", "aft")
    return model, fit_member(folder, model, make_loss(name, *train.tensors[1].numpy().T, **loss_options), train, Plain(1, 20), config)


@pytest.fixture
def config():
    from brainmets.train.learner import TrainConfig
    return TrainConfig(epochs=2, batch_size=8, device="cpu", patience=9)


def test_a_finished_member_of_other_first_weights_is_not_reused(config, tmp_path):
    from brainmets.tables import DataError
    small_fit(tmp_path/"member", config)
    small_fit(tmp_path/"member", config)  # the same question: read
    with pytest.raises(DataError, match="first_weights"): small_fit(tmp_path/"member", config, seed=1)
    with pytest.raises(DataError, match="first_weights"): small_fit(tmp_path/"member", config, sigma=0.05)  # what the loss learns has a start too
    with pytest.raises(DataError, match="loss"): small_fit(tmp_path/"member", config, distribution="weibull")


def test_a_finished_member_goes_to_the_device_of_the_settings(config, tmp_path, monkeypatch):
    small_fit(tmp_path/"member", config)
    asked = []
    monkeypatch.setattr("brainmets.train.learner.training_device", lambda name: asked.append(name) or torch.device("meta"))
    monkeypatch.setattr("brainmets.train.learner.load_best", lambda folder, model, loss: None)  # a meta device holds no numbers
    model, _ = small_fit(tmp_path/"member", config)
    assert {p.device.type for p in model.parameters()} == {"meta"} and set(asked) == {"cpu"}


def reads_of(folder, config, n, monkeypatch):
    "How often brainmets and fastai turn a tensor into a number while training on n rows, looking at each 20th batch as on a card."
    from brainmets.train import learner
    kind, counts, own = learner.RefuseNonFinite, [], str(Path(learner.__file__).parent.parent)

    def counted(name, original):
        def read(tensor, *args, **options):
            place = sys._getframe(1).f_code.co_filename
            if place.startswith(own) or "/fastai/" in place.replace(os.sep, "/"): counts.append(name)
            return original(tensor, *args, **options)
        return read
    with monkeypatch.context() as patched:
        patched.setattr(learner, "RefuseNonFinite", lambda every: kind(20))
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"): patched.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        small_fit(folder, config, n=n)
    return len(counts)


def test_numbers_are_not_read_from_the_device_in_each_batch(tmp_path, monkeypatch):
    from brainmets.train.learner import TrainConfig
    config = TrainConfig(epochs=1, batch_size=4, clip_norm=1.0, accumulate=2, device="cpu")
    few, many = (reads_of(tmp_path/str(n), config, n, monkeypatch) for n in (4*24, 4*40))  # 24 and 40 batches: two looks either way
    assert few == many > 0


@pytest.fixture
def half_precision_on_the_cpu(monkeypatch):
    "Mixed precision as on CUDA, with torch's CPU forms of its two parts."
    from brainmets.train import learner
    from fastai.callback import fp16
    callbacks = learner.step_callbacks
    monkeypatch.setattr(learner, "step_callbacks", lambda config, device: callbacks(config, torch.device("cuda")))
    monkeypatch.setattr(fp16, "autocast", lambda device, dtype: torch.amp.autocast("cpu", dtype=dtype))
    monkeypatch.setattr(fp16, "GradScaler", lambda device, **options: torch.amp.GradScaler("cpu", **options))


class BreaksOff(Plain):
    "Is interrupted at a row of its third epoch."
    n_read = 0

    def __getitem__(self, i):
        self.n_read += 1
        if self.n_read == 100: raise KeyboardInterrupt
        return super().__getitem__(i)


def test_skipped_steps_are_noted_also_over_a_break(half_precision_on_the_cpu, tmp_path):
    from brainmets.train.learner import TrainConfig, read_history
    config = TrainConfig(epochs=4, batch_size=8, accumulate=2, clip_norm=1.0, schedule="one-cycle", patience=9, device="cpu")
    _, whole = small_fit(tmp_path/"whole", config, name="mse")  # in days: overflows until the scale is low enough
    n_skipped = int(whole.notes[-1].split("skipped ")[1].split()[0])
    assert 3 <= n_skipped <= 6, whole.notes  # from a scale of 1024; from 65536 it would be six more
    with pytest.raises(KeyboardInterrupt): small_fit(tmp_path/"broken", config, name="mse", train=BreaksOff(0, 40))
    assert len(read_history(tmp_path/"broken").epochs) == 2
    _, again = small_fit(tmp_path/"broken", config, name="mse")
    assert again.notes == whole.notes and again.epochs.equals(whole.epochs)
    assert (tmp_path/"whole"/"best.safetensors").read_bytes() == (tmp_path/"broken"/"best.safetensors").read_bytes()
    _, small = small_fit(tmp_path/"huber", config, name="huber")
    assert not small.notes


def test_checkpoints_by_time_change_no_result(tmp_path, monkeypatch):
    "With a long pause between checkpoints one is written, at the end; weights and history are those of a checkpoint an epoch."
    from brainmets.train import learner
    written, write = [], learner.write_checkpoint
    monkeypatch.setattr(learner, "write_checkpoint", lambda folder, *rest: written.append(folder.name) or write(folder, *rest))
    for name, seconds in (("each", 0.0), ("last", 1e9)):
        small_fit(tmp_path/name, learner.TrainConfig(epochs=4, batch_size=8, device="cpu", patience=9, checkpoint_seconds=seconds))
    assert (written.count("each"), written.count("last")) == (4, 1)
    assert results(tmp_path/"each") == results(tmp_path/"last")
