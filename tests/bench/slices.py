"""Reading slices and training on them, against the plain ways: rows of `make bench` slices."""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from brainmets.checks import check
from brainmets.losses import make_loss
from brainmets.models.hybrid import HybridNet, hybrid_config
from brainmets.phantom import write_phantom
from brainmets.samples.pictures import SliceConfig, cut_slices, normalise, resize
from brainmets.samples.slices import SliceDataset, resident, write_slices
from brainmets.train.learner import TrainConfig, derived_seeds, fit_member, ordered_loader, seeded, training_device, training_loader
from brainmets.volumes import read_voxels

N_EPOCH, N_IDS = 64231, 104        # slices of the paper's training set; ids x 4 sequences x 155 slices = 64,480
SEED = 0
CPU = torch.device("cpu")


def images_of_phantom(folder, n_patients, shape):
    "The images table of a phantom without its masks, and the folder of its data."
    manifest = write_phantom(folder, n_patients=n_patients, shape=shape, workers=2, progress=False)
    cohort = check(manifest, manifest.parent, voxels=False, n_workers=1)
    return cohort.images[cohort.images["sequence"] != "mask"], cohort.data_dir


def seconds_of(call):
    "Seconds on the clock and of processor time."
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def read_all(loader):
    for _ in loader: pass


def load(): return {"load_of_machine": round(os.getloadavg()[0], 1)}


# --- reading

class PngSlices(Dataset):
    "The pictures of a `SliceDataset` from one PNG file each, item by item."
    def __init__(self, dataset, folder):
        self.like, self.paths = dataset, [f"{folder}/{k}.png" for k in range(len(dataset))]
        for k, path in enumerate(self.paths): Image.fromarray(dataset.stored(k)[0]).save(path)

    def __len__(self): return len(self.paths)

    def __getitem__(self, k):
        picture = np.asarray(Image.open(self.paths[k]))[None]
        return torch.from_numpy(normalise(picture, self.like.config)), self.like.tabular[self.like.tabular_of[k]], self.like.target[k]


class NiftiSlices(Dataset):
    "The same from the volumes: each item unpacks its file as far as the slice. The grey values to scale by and the window are known beforehand."
    def __init__(self, dataset, cache, rows, images, data_dir):
        paths = {(i.sample_id, i.sequence): data_dir/i.path for i in images.itertuples()}
        self.like, self.places = dataset, [(paths[row.scan_id, row.sequence], row.slice_index, cache.grids[row.scan_id].window) for row in rows.itertuples()]
        percents = [dataset.config.low_percent, dataset.config.high_percent]
        voxels = {path: read_voxels(path) for path in set(paths.values())}
        self.ranges = {path: np.percentile(array[array != 0], percents) for path, array in voxels.items()}

    def __len__(self): return len(self.places)

    def __getitem__(self, k):
        path, slice_index, window = self.places[k]
        image = nib.as_closest_canonical(nib.load(path).slicer[:, :, slice_index:slice_index + 1])
        voxels, (low, high) = np.asarray(image.dataobj, np.float32), self.ranges[path]
        scaled = ((voxels - low)/(high - low)).clip(0, 1).astype(np.float32)*(voxels != 0)
        size = self.like.config.size
        stored = np.rint(255*resize(cut_slices(scaled, window), (size, size))).astype(np.uint8)
        return torch.from_numpy(normalise(stored, self.like.config)), self.like.tabular[self.like.tabular_of[k]], self.like.target[k]


def dataset_of(cache, rows, n_features=21):
    "Slices with drawn tabular values and outcomes."
    rng = np.random.default_rng(SEED)
    rows = rows.assign(time_days=rng.exponential(400, len(rows)), event=rng.random(len(rows)) < 0.8)
    return SliceDataset(cache, rows, rng.normal(size=(len(rows), n_features)))


def plain_loader(dataset, n=None):
    "Batches of 32 in random order; of n items, when n is given."
    drawn = torch.utils.data.RandomSampler(dataset, num_samples=n, generator=torch.Generator().manual_seed(SEED))
    return DataLoader(dataset, batch_size=32, sampler=drawn, num_workers=0)


def check_equal(dataset, other, positions, share=0.0):
    "The other dataset gives the same items; a share of the pixels may be one grey level off."
    level = 1/(255*dataset.config.sd)
    for k in positions:
        (image, *rest), (found, *others) = dataset[k], other[k]
        assert image.shape == found.shape and all(torch.equal(a, b) for a, b in zip(rest, others))
        differs = (image - found).abs() > 1e-6
        assert differs.float().mean() <= share and (image - found).abs().max() < 1.01*level, f"another picture at {k}"


def bench_reading(cache, images, data_dir, n_turns=3, n_passes=10, n_nifti=64):
    "Two rows: slices per second from the cache, against NIfTI and against PNG."
    dataset, config = dataset_of(cache, cache.samples), TrainConfig(device="cpu")
    ours = training_loader(dataset, config, torch.Generator().manual_seed(SEED), CPU)
    with tempfile.TemporaryDirectory() as folder:
        png, nifti = PngSlices(dataset, folder), NiftiSlices(dataset, cache, cache.samples, images, data_dir)
        check_equal(dataset, png, range(len(dataset)))
        check_equal(dataset, nifti, range(0, len(dataset), 97), share=0.001)
        seconds = {"cache": [], "png": []}
        for _ in range(n_turns):
            seconds["png"].append(seconds_of(lambda: read_all(plain_loader(png)))[0]/len(dataset))
            seconds["cache"].append(seconds_of(lambda: [read_all(ours) for _ in range(n_passes)])[0]/len(dataset)/n_passes)
        seconds["nifti"] = [seconds_of(lambda: read_all(plain_loader(nifti, n_nifti)))[0]/n_nifti]
    rate = {name: 1/np.median(values) for name, values in seconds.items()}
    common = {"what": "128x128 slices in random order, batches of 32, one thread", "n_slices": len(dataset), "slices_per_second": rate["cache"]}
    named = {"nifti": f"240x240x155 NIfTI (gz) unpacked as far as each slice, {n_nifti} slices", "png": "one PNG a slice, plain Dataset and DataLoader"}
    return [{**common, "reference": text, "reference_slices_per_second": rate[name], "times_faster": rate["cache"]/rate[name], "target": "10 times faster", **load()}
            for name, text in named.items()]


# --- a step of training

def plain_epoch(net, loss, dataset, config, device=CPU):
    "The reference: an epoch in a plain PyTorch loop, with the order of rows and the chance of `fit_member`."
    generator = torch.Generator().manual_seed(derived_seeds(SEED, 4)[3])
    half = config.mixed_precision and device.type == "cuda"
    scaler, optimiser = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=half), torch.optim.Adam(net.parameters(), lr=config.lr)
    net.train()
    with seeded(SEED):
        for image, tabular, target in training_loader(dataset, config, generator, device):
            optimiser.zero_grad()
            with torch.autocast(device.type, torch.float16, enabled=half): prediction = net(image, tabular)
            scaler.scale(loss(prediction.float(), target)).backward()
            scaler.step(optimiser)
            scaler.update()


def new_net(backbone="resnet10t", size=64): return HybridNet(hybrid_config("quick", backbone=backbone, image_size=size), seed=SEED)


def note_steps(net):
    "A list that receives the clock and the processor time at each training batch that enters the net."
    noted = []
    net.register_forward_pre_hook(lambda module, inputs: noted.append((time.perf_counter(), time.process_time())) if module.training else None)
    return noted


def time_epochs(loss, train, valid, config):
    "Of an epoch, plain and ours: seconds (clock, processor), and those from each training batch to the next. Both end with the same weights."
    plain, ours = new_net(), new_net()
    noted = {"plain": note_steps(plain), "ours": note_steps(ours)}
    with tempfile.TemporaryDirectory() as folder:
        whole = {"plain": seconds_of(lambda: plain_epoch(plain, loss, train, config)),
                 "ours": seconds_of(lambda: fit_member(folder, ours, loss, train, valid, config, SEED))}
    for (name, a), b in zip(plain.state_dict().items(), ours.state_dict().values()): assert torch.equal(a, b), f"other weights: {name}"
    return {who: (np.array(whole[who]), np.diff(noted[who], axis=0)) for who in whole}


def epochs_in_turn(cache, n_turns, few, many):
    "What `time_epochs` gives for epochs of few and of many steps in turn: (n steps, found); and the batches of the validation."
    rows, config = cache.samples, TrainConfig(epochs=1, device="cpu")
    draw = lambda n: dataset_of(cache, rows.sample(32*n, replace=True, random_state=SEED))
    data, valid = {n: draw(n) for n in (few, many)}, dataset_of(cache, rows[:32*5])
    loss = make_loss("mse", data[many].target[:, 0], data[many].target[:, 1])
    time_epochs(loss, draw(2), valid, config)                               # warm up
    return [(n, time_epochs(loss, data[n], valid, config)) for _ in range(n_turns) for n in (few, many)], ordered_loader(valid, 32)


def bench_step(cache, n_turns=3, few=20, many=60):
    "Two rows: a step of `fit_member` against a plain loop, and what an epoch costs beside its steps."
    turns, watched = epochs_in_turn(cache, n_turns, few, many)
    epoch = {(who, n): np.median([found[who][0] for m, found in turns if m == n], axis=0) for who in ("plain", "ours") for n in (few, many)}
    plain, ours = ((epoch[who, many] - epoch[who, few])/(many - few) for who in ("plain", "ours"))
    typical = {who: np.median(np.concatenate([found[who][1] for _, found in turns]), axis=0) for who in ("plain", "ours")}
    beside = {who: np.median([(found[who][0] - n*np.median(found[who][1], axis=0))[1] for n, found in turns]) for who in typical}
    net = new_net().eval()
    with torch.no_grad(): _, validation = seconds_of(lambda: [net(image, tabular) for image, tabular, _ in watched])
    what = f"resnet10t at 64, batch 32, one thread; slope between {few} and {many} steps, medians of {n_turns} epochs"
    return [{"what": f"a step of fit_member: {what}", "seconds": ours[0], "processor_seconds": ours[1], "median_step_seconds": typical["ours"][0],
             "reference": "plain PyTorch loop, same net, loader, weights at the end", "reference_seconds": plain[0], "reference_processor_seconds": plain[1],
             "reference_median_step_seconds": typical["plain"][0], "ratio": ours[0]/plain[0], "processor_ratio": ours[1]/plain[1],
             "median_step_ratio": typical["ours"][0]/typical["plain"][0], "median_step_processor_ratio": typical["ours"][1]/typical["plain"][1], "target": "ratio at most 1.05", **load()},
            {"what": "an epoch of fit_member beside its steps: Learner, validation of 160 slices, checkpoint", "processor_seconds": beside["ours"], "validation_processor_seconds": validation,
             "reference": "plain PyTorch loop beside its steps, without these", "reference_processor_seconds": beside["plain"], **load()}]


# --- a whole epoch

EPOCH = """
import re, sys, tempfile, time
import numpy as np, torch
from brainmets.samples.slices import SliceDataset, read_slices
from brainmets.train.learner import TrainConfig, fit_member, training_loader

class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.last = torch.nn.AvgPool2d(16), torch.nn.Linear(64, 1)
    def forward(self, image, tabular): return self.last(self.pool(image).flatten(1))

def nearness(prediction, target): return (prediction[:, 0] - target[:, 0]).square().mean()
def status(name): return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])/1024

torch.set_num_threads(1)
cache, n, rng = read_slices(sys.argv[1]), int(sys.argv[2]), np.random.default_rng(0)
rows = cache.samples.assign(time_days=rng.random(len(cache.samples)), event=True).sample(frac=1, random_state=0)
train, valid = (SliceDataset(cache, part, rng.normal(size=(len(part), 21))) for part in (rows[:n], rows[n:]))
config, before = TrainConfig(epochs=1, device="cpu"), status("VmHWM")
began = time.perf_counter()
with tempfile.TemporaryDirectory() as folder: fit_member(folder, Small(), nearness, train, valid, config)
trained, peak, mapped = time.perf_counter() - began, status("VmHWM"), status("RssFile")
began = time.perf_counter()
for _ in training_loader(train, config, torch.Generator().manual_seed(0), torch.device("cpu")): pass
print(trained, time.perf_counter() - began, peak, before, mapped, len(train))
"""


def epoch_cache(folder):
    "A cache of 64,480 slices: 104 ids for the four volumes of one phantom patient. The images are cut as often as there are ids."
    images, data_dir = images_of_phantom(folder/"small", 1, (128, 128, 155))
    many = pd.concat([images.assign(patient_id=f"P{k:03}", sample_id=f"P{k:03}") for k in range(N_IDS)], ignore_index=True)
    return write_slices(many, data_dir, folder/"cache", SliceConfig(), n_workers=2, progress=False)


def bench_memory(cache):
    "One row: peak memory and seconds of an epoch whose net is so small that reading decides."
    done = subprocess.run([sys.executable, "-c", EPOCH, str(cache.home), str(N_EPOCH)], capture_output=True, text=True, check=True)
    seconds, read, peak, before, mapped, n = map(float, done.stdout.split()[-6:])
    return {"what": "an epoch of fit_member in random order, batches of 32, net of average pooling and one Linear", "n_slices": int(n), "seconds": seconds,
            "slices_per_second": n/seconds, "reading_alone_seconds": read, "peak_memory_mb": peak, "memory_before_epoch_mb": before, "memory_of_mapped_files_mb": mapped,
            "target": "peak below 3,000 MB", **load()}


def bench_card(cache, batch_size, device, n=N_EPOCH):
    "One row: an epoch of EfficientNet-B0 in mixed precision, the slices on the card."
    rows, config = cache.samples.sample(frac=1, random_state=SEED), TrainConfig(epochs=1, batch_size=batch_size, device=str(device), pin_memory=False)
    warm, train, valid = (resident(dataset_of(cache, part), device) for part in (rows[:30*batch_size], rows[:n], rows[n:][:249]))
    loss, nets = make_loss("mse", train.target[:, 0].cpu(), train.target[:, 1].cpu()).to(device), {who: new_net("efficientnet_b0", 128).to(device) for who in ("warm", "plain", "ours")}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def fit(net, dataset):
        with tempfile.TemporaryDirectory() as folder: fit_member(folder, net, loss, dataset, valid, config, SEED)
        wait()

    fit(nets["warm"], warm)
    ours, _ = seconds_of(lambda: fit(nets["ours"], train))
    plain, _ = seconds_of(lambda: (plain_epoch(nets["plain"], loss, train, config, device), wait()))
    card = {"card": torch.cuda.get_device_name(device), "peak_card_mb": torch.cuda.max_memory_allocated(device)/2**20} if device.type == "cuda" else {}
    return {"what": f"an epoch of EfficientNet-B0 at 128, mixed precision, batch {batch_size}, slices on the card", "n_slices": len(train), "seconds": ours,
            "slices_per_second": len(train)/ours, "reference": "plain PyTorch loop, same net, loader", "reference_seconds": plain, "ratio": ours/plain, **card,
            "target": "8 s on an H100", **load()}


def card_rows(cache):
    "Rows of the card, or one that says there is none."
    if not torch.cuda.is_available(): return [{"what": "an epoch of EfficientNet-B0 at 128, mixed precision, slices on the card: no CUDA device", "target": "8 s on an H100"}]
    return [bench_card(cache, n, training_device("cuda")) for n in (32, 256)]


def bench_slices():
    "All rows, on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            images, data_dir = images_of_phantom(folder/"large", 2, (240, 240, 155))
            cut = lambda size: write_slices(images, data_dir, folder/"cache", SliceConfig(size=size), n_workers=2, progress=False)
            rows = [*bench_reading(cut(128), images, data_dir), *bench_step(cut(64))]
            whole = epoch_cache(folder)
            return [*rows, bench_memory(whole), *card_rows(whole)]
    finally: torch.set_num_threads(threads)
