"""Training, reading and inference of the vision transformer, against the plain ways: rows of `make bench` vit."""
import ctypes
import math
import os
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import ViT
from monai.transforms import Compose, ConcatItemsd, CropForegroundd, EnsureChannelFirstd, LoadImaged, Orientationd, ResizeWithPadOrCropd, ScaleIntensityRangePercentilesd
from torch import nn

from brainmets.batches import accumulate
from brainmets.checks import check
from brainmets.losses import make_loss
from brainmets.models.vit import ViTNet, count_operations, count_parameters, vit_config
from brainmets.phantom import write_phantom
from brainmets.samples.augment import Augment, AugmentConfig
from brainmets.samples.crops import EDEMA_CROPS, CropConfig, CropDataset, crops_of_cohort, cut_crops, resident_crops
from brainmets.train import volume
from brainmets.train.learner import TrainConfig, derived_seeds, deterministic, predict, seeded, training_loader
from brainmets.train.volume import Flips, VolumeArm, build_net, dataset_of, fit_net, learning_parts, net_config, variation

CROP, PUBLIC = EDEMA_CROPS.size, (95, 123, 108)   # voxels of our crop without its rim, and of that of the public code
SEED, BATCH, N_CLINICAL = 0, 10, 27
N_PATIENTS, N_EVENTS = 253, 36                    # of the paper's training centers
ADAMW = dict(lr=2e-3, weight_decay=1e-4)
CPU = torch.device("cpu")


def load(): return {"load_of_machine": round(os.getloadavg()[0], 1)}


def clocks(): return np.array([time.perf_counter(), time.process_time(), os.times().system])


def seconds_of(call):
    "Seconds on the clock, of processor time, and of these in the system (memory is made ready there)."
    began = clocks()
    call()
    return clocks() - began


def in_turn(calls, n_turns, n_warm=1):
    "Median `seconds_of` each call, one after the other in every turn; the first turns do not count."
    turns = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(n_warm + n_turns)][n_warm:]
    return {name: np.median([turn[name] for turn in turns], axis=0) for name in calls}


# --- a step of training

class PublicNet(nn.Module):
    "The reference: MONAI's vision transformer, whose attention is two einsums, and the head of the public code of Erdur et al. (2025)."
    def __init__(self, image_size, config): # ViTConfig, for the other sizes
        super().__init__()
        first, second = config.head_sizes
        self.vit = ViT(config.in_channels, image_size, config.patch, config.hidden, config.mlp, config.layers, config.heads, dropout_rate=config.dropout,
                       classification=True, num_classes=first, post_activation="none")
        self.joined, self.risk = nn.Linear(first + config.n_clinical, second), nn.Linear(second, 1)
        assert not any(part.use_flash_attention for part in self.modules() if isinstance(part, SABlock)), "the reference has fused attention"

    def forward(self, image, clinical):
        features = torch.cat([nn.functional.leaky_relu(self.vit(image)[0]), clinical], 1)
        return self.risk(nn.functional.leaky_relu(self.joined(features)))


def voxels_seen(image_size, patch):
    "What a convolution with that stride sees: the rest of each side is dropped."
    return math.prod(n//patch*patch for n in image_size)


def drawn_batch(n, image_size, config, device=CPU):
    "Noise of the size of a batch, outcomes with three events."
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    target = torch.stack([draw(n).exp()*400, (torch.arange(n) < 3).float()], 1)
    return [part.to(device) for part in (draw(n, config.in_channels, *image_size), draw(n, config.n_clinical), target)]


def cox(): return make_loss("cox", [100.0, 200.0], [True, False])


def status_mb(name): return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])/1024


def memory_of(call):
    "By how much the memory of the process grows at most during a call, in MB (Linux)."
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mb("VmRSS")
    call()
    return status_mb("VmHWM") - before


def stepper(net, batch, one_run=True, half=False):
    "A function that takes a step of AdamW from a batch: with the Cox loss, as `train.volume` does."
    image, clinical, target = batch
    net.train()
    loss, optimiser = cox(), torch.optim.AdamW(net.parameters(), **ADAMW)

    def step():
        with torch.autocast(image.device.type, torch.bfloat16, enabled=half): accumulate(net, [((image, clinical), target)], loss, keep_graphs=one_run)
        optimiser.step()
        optimiser.zero_grad()
    return step


def step_facts(seconds, net, n, voxels):
    "What is said about a net: seconds of a step by patient and by voxels."
    wall, cpu, system = seconds
    return {"seconds_a_step": wall, "seconds_a_patient": wall/n, "seconds_per_1000_voxels_seen": wall/n/voxels*1000, "processor_seconds_a_step": cpu, "processor_seconds_a_patient": cpu/n, "of_these_in_the_system": system/n,
            "processor_seconds_per_1000_voxels_seen": cpu/n/voxels*1000, "voxels_seen": voxels, "parameters": sum(p.numel() for p in net.parameters())}


def sides(size): return "x".join(map(str, size))


def bench_step(config, crop, public, n=BATCH, n_turns=2):
    "One row: a step of ours and one of the reference, in turn, of as many patients."
    nets = {"ours": ViTNet(config, SEED), "public": PublicNet(public, config)}
    assert sum(p.numel() for p in nets["ours"].parameters()) == count_parameters(nets["ours"])["total"]
    batch, plain = drawn_batch(n, config.image_size, config), drawn_batch(n, public, config)
    calls = {"ours": stepper(nets["ours"], batch), "public": stepper(nets["public"], plain), "two": stepper(nets["ours"], batch, one_run=False)}
    memory = {name: memory_of(call) for name, call in calls.items()}                  # the first step also makes the state of the optimiser
    seconds = in_turn(calls, n_turns, n_warm=0)
    ours = step_facts(seconds["ours"], nets["ours"], n, math.prod(crop)) | {"memory_of_step_mb": memory["ours"]}
    reference = step_facts(seconds["public"], nets["public"], n, voxels_seen(public, config.patch)) | {"memory_of_step_mb": memory["public"]}
    what = f"a training step: forward, Cox loss, backward, AdamW; batch {n}, {config.in_channels}x{sides(config.image_size)}, {config.n_tokens} tokens, one thread; the crop of {sides(crop)} is seen whole, its rim not counted"
    return {"what": what, **ours, "processor_seconds_a_step_in_two_runs": seconds["two"][1], "memory_of_step_in_two_runs_mb": memory["two"],
            "reference": f"MONAI ViT, einsum attention, head of the public code, {sides(public)}; same loss, same AdamW", **{f"reference_{k}": v for k, v in reference.items()},
            **{f"ratio_{k}": ours[k]/reference[k] for k in ours if "seconds_a_patient" in k or "per_1000" in k}, "n_turns": n_turns, **load()}


# --- the way of the data

def cohort_of_phantom(folder, n_patients, shape):
    "A checked phantom cohort."
    manifest = write_phantom(folder/f"cohort-{n_patients}", n_patients=n_patients, shape=shape, workers=2, progress=False)
    return check(manifest, manifest.parent, voxels=False, n_workers=1)


def files_of(cohort): return [{i.sequence: cohort.data_dir/i.path for i in rows.itertuples()} for _, rows in cohort.images.groupby("patient_id")]


def plain_reading(config):
    "The reference: MONAI transforms that read, scale and crop around the mask; lesions are not looked for, and the mask keeps its values."
    names = [*config.sequences, "mask"]
    return Compose([LoadImaged(names, reader="NibabelReader", image_only=True), EnsureChannelFirstd(names), Orientationd(names, axcodes="RAS", labels=None),
                    ScaleIntensityRangePercentilesd(list(config.sequences), config.low_percent, config.high_percent, 0, 1, clip=True),
                    CropForegroundd(names, source_key="mask", allow_smaller=True), ResizeWithPadOrCropd(names, config.shape), ConcatItemsd(names, "image")])


def bench_reading(cohort, cache, n_turns=2, n_passes=20):
    "One row: a patient from the cache, against the two ways that read the volumes."
    files, config, read = files_of(cohort), cache.config, plain_reading(cache.config)
    dataset, rows = CropDataset(cache, cache.samples, outcome=None), range(len(cache.samples))
    varied = CropDataset(cache, cache.samples, outcome=None, augment=Augment(AugmentConfig(seed=SEED)))
    calls = {"cache": lambda: [dataset.batch([k]) for _ in range(n_passes) for k in rows], "monai": lambda: [read(paths)["image"] for paths in files],
             "cut": lambda: [cut_crops(paths, config, cohort.manifest.labels) for paths in files], "varied": lambda: [(varied.set_epoch(e), varied.batch([k])) for e in range(n_passes//2) for k in rows]}
    for k, paths in enumerate(files):
        assert np.array_equal(cut_crops(paths, config, cohort.manifest.labels)[0][0], dataset.stored(k)), "another crop"
        assert read(paths)["image"].shape[1:] == dataset[k][0].shape[1:]
    found = in_turn(calls, n_turns)
    each = {name: found[name]/len(files)/{"cache": n_passes, "varied": n_passes//2}.get(name, 1) for name in calls}
    faster = lambda name: dict(zip(("times_faster", "processor_times_faster"), each[name][:2]/each["cache"][:2]))
    common = {"what": f"a crop of {sides(config.shape)} from the cache to a float32 tensor, one thread, files in the memory of the system", "seconds_a_patient": each["cache"][0],
              "processor_seconds_a_patient": each["cache"][1], "seconds_a_patient_augmented": each["varied"][0], "processor_seconds_a_patient_augmented": each["varied"][1]}
    named = {"monai": "MONAI transforms: read gzipped NIfTI, percentiles, box of the mask, fixed size", "cut": "`cut_crops` each time: reads, looks for lesions, the same crop as in the cache"}
    return [{**common, "reference": f"240x240x155, {len(config.sequences)} sequences and mask; {text}", "reference_seconds_a_patient": each[name][0],
             "reference_processor_seconds_a_patient": each[name][1], **faster(name), "target": "50 times faster", **load()} for name, text in named.items()]


def bench_inference(cache, config, public, n_turns=3):
    "One row: a risk from a crop in the cache."
    dataset = CropDataset(cache, cache.samples, np.zeros((len(cache.samples), config.n_clinical), np.float32), outcome=None)
    ours, plain = ViTNet(config, SEED).eval(), PublicNet(public, config).eval()
    image, clinical, _ = drawn_batch(1, public, config)
    with torch.no_grad(): found = in_turn({"ours": lambda: predict(ours, dataset, batch_size=1), "public": lambda: plain(image, clinical)}, n_turns)
    wall, cpu, _ = found["ours"]/len(dataset)
    return {"what": "a risk from a crop in the cache: read, forward, one by one; full size, float32, one thread", "seconds_a_patient": wall, "processor_seconds_a_patient": cpu,
            "reference": f"MONAI ViT, einsum attention, {sides(public)}, in memory; it sees {100*voxels_seen(public, config.patch)/math.prod(CROP):.0f} % as many voxels",
            "reference_seconds_a_patient": found["public"][0], "reference_processor_seconds_a_patient": found["public"][1], "target": "paper: 0.5 s on its GPU", **load()}


# --- the loop

def rows_of(cache, n, n_events, start=0):
    "n samples over the crops of a cache, with drawn outcomes of which n_events are events; their encoded columns, noise."
    rng = np.random.default_rng(SEED + start)
    rows = cache.samples.iloc[np.arange(n) % len(cache.samples)].reset_index(drop=True)
    ids = [f"P{start + k:04}" for k in range(n)]
    rows = rows.assign(patient_id=ids, sample_id=ids, scan_id=ids, time_days=rng.exponential(400, n).round() + 1, event=rng.permutation(np.arange(n) < n_events))
    return rows, pd.DataFrame(rng.normal(size=(n, N_CLINICAL)), index=ids)


def note_parts(net):
    "A list that receives the clocks at each part that enters the net in training."
    noted = []
    net.register_forward_pre_hook(lambda module, inputs: noted.append(clocks()) if module.training else None)
    return noted


def crops_to_learn(arm, cache, rows, tabular): return dataset_of(arm, cache, rows, tabular, augment=variation(arm.augment, derived_seeds(SEED, 6)[5]))


def loop_by_hand(arm, source, net, epochs, data=None, device=CPU):
    "The reference: the epochs of `fit_net` in a plain loop, with its batches, its chance and its weights at the end, without validation and checkpoints."
    data, (steps, _) = source if data is None else data, learning_parts(arm, source, SEED, (0, 1))
    loader = training_loader(data, arm.train, torch.Generator().manual_seed(derived_seeds(SEED, 4)[3]), device, steps)
    loss, optimiser = cox(), torch.optim.AdamW(net.parameters(), lr=arm.train.lr, weight_decay=arm.train.weight_decay)
    net.train()
    with seeded(SEED), deterministic(device.type == "cpu"):
        for epoch in range(epochs):
            for part in (data, steps): part.set_epoch(epoch)
            for batch in loader:
                *inputs, target = [part.to(device).split(arm.train.batch_size) for part in batch]
                with torch.autocast(device.type, torch.bfloat16, enabled=arm.precision == "bf16"):
                    accumulate(net, list(zip(zip(*inputs), target)), loss, arm.risk_set, keep_graphs=arm.keep_graphs)
                optimiser.step()
                optimiser.zero_grad()
    return steps


def noted_fit(*given):
    "What `fit_net` trains, and the clocks at each part."
    noted, plain = [], volume.build_net

    def noting(*sizes):
        net = plain(*sizes)
        noted.append(note_parts(net))
        return net
    with mock.patch.object(volume, "build_net", noting): net, _ = fit_net(*given, SEED)
    return net, noted[0]


def step_seconds(noted, steps, batch_size, epochs):
    "What the clocks say from the first part of a step to that of the next, within epochs."
    found, at = [], 0
    for epoch in range(epochs):
        steps.set_epoch(epoch)
        first = np.cumsum([0, *(math.ceil(len(rows)/batch_size) for rows in steps)])
        found += [noted[at + b] - noted[at + a] for a, b in pairwise(first[:-1])]
        at += first[-1]
    assert at == len(noted), "parts were counted wrongly"
    return found


def small_arm(epochs):
    "A net and a training that are small."
    options = dict(zip(("patch", "hidden", "layers", "heads", "mlp"), (8, 96, 4, 4, 192)))
    train = TrainConfig(epochs=epochs, patience=epochs, batch_size=BATCH, optimiser="adamw", keep="last", mixed_precision=False, device="cpu", checkpoint_seconds=60, **ADAMW)
    return VolumeArm("vit", options=options, train=train, augment=Flips(), keep_graphs=True)


def bench_loop(folder, n=64, n_events=32, epochs=3, n_turns=3):
    "One row: a step of `fit_net` at a small size, against the same step by hand."
    crops = crops_of_cohort(cohort_of_phantom(folder, 6, (32, 32, 32)), folder/"small", CropConfig(size=(32, 32, 32), pad_to=None, spacing_mm=4.0, align="exact"), progress=False)
    arm, (learned, tabular), (watched, others) = small_arm(epochs), rows_of(crops, n, n_events), rows_of(crops, 10, 5, start=n)
    config, seconds = net_config(arm, crops.config.shape, len(crops.config.channels), N_CLINICAL), {"hand": [], "fit_net": []}
    for turn in range(n_turns):
        by_hand = build_net(arm, config, SEED)
        noted = {"hand": note_parts(by_hand)}
        steps = loop_by_hand(arm, crops_to_learn(arm, crops, learned, tabular), by_hand, epochs)
        trained, noted["fit_net"] = noted_fit(arm, folder/f"run-{turn}", crops, learned, watched, pd.concat([tabular, others]))
        for (name, a), b in zip(by_hand.state_dict().items(), trained.state_dict().values()): assert torch.equal(a, b), f"other weights: {name}"
        for who in seconds: seconds[who] += step_seconds(noted[who], steps, BATCH, epochs)
    (wall, cpu, _), (wall_hand, cpu_hand, _) = (np.median(seconds[who], axis=0) for who in ("fit_net", "hand"))
    return {"what": f"a step of `fit_net` (fastai, OneRiskSet: 4 batches of {BATCH} in one run, flips), 3x32x32x32, hidden 96, 4 layers, one thread; median from step to step", "n_steps": len(seconds["hand"]),
            "seconds_a_step": wall, "processor_seconds_a_step": cpu, "reference": "plain PyTorch loop, same reader, same weights at the end", "reference_seconds_a_step": wall_hand,
            "reference_processor_seconds_a_step": cpu_hand, "ratio": wall/wall_hand, "processor_ratio": cpu/cpu_hand, "target": "ratio at most 1.05", **load()}


# --- on a card

def card_facts(device):
    "Its name, and the most memory that was in use since it was last forgotten."
    if device.type != "cuda": return {"card": "none: the code was tried on the CPU"}
    return {"card": torch.cuda.get_device_name(device), "peak_card_mb": torch.cuda.max_memory_allocated(device)/2**20}


def wait(device):
    if device.type == "cuda": torch.cuda.synchronize(device)


def forget_peak(device):
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats(device)


def card_step_facts(step, device, n_steps):
    "Seconds of a step, after steps that compile and warm up; and the memory."
    def many():
        for _ in range(n_steps): step()
        wait(device)
    forget_peak(device)
    many()
    return {"seconds_a_step": min(seconds_of(many)[0] for _ in range(3))/n_steps, **card_facts(device)}


def bench_card_step(config, public, device, n=BATCH, n_steps=10):
    "One row: a step in bf16, fused attention, compiled, against float32 with einsum attention at the same size, and at that of the public code."
    batch, plain = drawn_batch(n, config.image_size, config, device), drawn_batch(n, public, config, device)
    made = {"ours": lambda: stepper(torch.compile(ViTNet(config, SEED).to(device)), batch, half=True), "not_compiled": lambda: stepper(ViTNet(config, SEED).to(device), batch, half=True),
            "reference": lambda: stepper(PublicNet(config.image_size, config).to(device), batch), "public": lambda: stepper(PublicNet(public, config).to(device), plain)}
    found = {name: card_step_facts(make(), device, n_steps) for name, make in made.items()}
    seconds = {name: facts["seconds_a_step"] for name, facts in found.items()}
    operations = 6*n*count_operations(ViTNet(config, SEED))                          # two for each pair, three times as many with the backward pass
    return {"what": f"a training step on a card, batch {n}, {sides(config.image_size)}: bf16, scaled-dot-product attention, torch.compile", **found["ours"], "tflop_per_second": operations/seconds["ours"]/1e12,
            "seconds_a_step_not_compiled": seconds["not_compiled"], "reference": "MONAI ViT, einsum attention, float32, same size (matrix products as PyTorch sets them, without TF32)",
            **{f"reference_{k}": v for k, v in found["reference"].items() if k != "card"}, "times_faster": seconds["reference"]/seconds["ours"],
            f"seconds_a_step_of_reference_{sides(public)}": seconds["public"], "target": "4 times faster", **load()}


def card_arm(config, device, n_workers, **changes):
    "The arm of the study with its paper preset, in bf16."
    options = {name: getattr(config, name) for name in ("patch", "hidden", "layers", "heads", "mlp")}
    train = TrainConfig(epochs=1, patience=1000, batch_size=BATCH, optimiser="adamw", keep="last", mixed_precision=False, device=str(device), n_workers=n_workers, checkpoint_seconds=60, **ADAMW)
    return VolumeArm("vit", options=options, train=train, precision="bf16", **changes)


def loop_seconds(run, device, few, many):
    "Seconds of an epoch, the slope between few and many, and what the first run took beside its one epoch; run(n) trains n epochs."
    found = []
    for n in (1, few, many):
        began = time.perf_counter()
        run(n)
        wait(device)
        found.append(time.perf_counter() - began)
    an_epoch = (found[2] - found[1])/(many - few)
    return an_epoch, found[0] - an_epoch


def real_loop(arm, folder, cache, learned, watched, tabular):
    "A function that trains n epochs with `fit_net`."
    return lambda n: fit_net(replace(arm, train=replace(arm.train, epochs=n)), folder/f"{n}", cache, learned, watched, tabular, SEED)


def fast_loop(arm, source, config, device):
    "A function that trains a net for n epochs in a plain loop, compiled, with all crops on the card."
    torch.compiler.reset()
    held, net = resident_crops(source, device), torch.compile(build_net(arm, config, SEED).to(device))
    arm = replace(arm, train=replace(arm.train, n_workers=0, pin_memory=False))
    return lambda n: loop_by_hand(arm, source, net, n, held, device)


def read_alone(arm, source):
    "Seconds that reading the first epoch takes without training."
    steps, _ = learning_parts(arm, source, SEED, (0, 1))
    loader = training_loader(source, arm.train, torch.Generator(), CPU, steps)
    return seconds_of(lambda: [None for _ in loader])[0], sum(map(len, steps))


def bench_card_epochs(folder, cache, config, device, augment, is_fast, n_workers=4, n=N_PATIENTS, few=2, many=5):
    "One row: five folds of 100 epochs, extrapolated from measured ones: four fifths learn, one fifth is watched. The crops are a few, under many names."
    n_learned = n - n//5
    (learned, tabular), (watched, others) = rows_of(cache, n_learned, round(n_learned*N_EVENTS/N_PATIENTS)), rows_of(cache, n//5, max(n//5*N_EVENTS//N_PATIENTS, 1), start=n_learned)
    arm = card_arm(config, device, n_workers, augment=augment, keep_graphs=is_fast)
    source = crops_to_learn(arm, cache, learned, tabular)
    reading, n_read = read_alone(arm, source)
    forget_peak(device)
    run = fast_loop(arm, source, config, device) if is_fast else real_loop(arm, folder, cache, learned, watched, pd.concat([tabular, others]))
    an_epoch, beside = loop_seconds(run, device, few, many)
    how = "plain loop, torch.compile, crops on the card, one run" if is_fast else f"`fit_net` as the study does: crops from the cache by {n_workers} processes, two runs, not compiled, validation and checkpoints"
    return {"what": f"five folds x 100 epochs of {n} patients, bf16, {sides(config.image_size)}, {'contrast, smoothing and flips' if augment else 'no augmentation'}; {how}", "minutes": 5*(beside + 100*an_epoch)/60,
            "seconds_an_epoch": an_epoch, "patients_an_epoch": n_read, "seconds_beside_epochs_a_fold": beside, "seconds_to_read_an_epoch_from_the_cache": reading, **card_facts(device),
            "target": "under 3 minutes on an H100; paper: 100 minutes, 6 GB", **load()}


def card_rows(folder, cache, config, public, device, **sizes):
    "Rows of the card."
    yield bench_card_step(config, public, device)
    for k, (augment, is_fast) in enumerate((a, f) for a in (AugmentConfig(), None) for f in (False, True)):
        yield bench_card_epochs(folder/f"card-{k}", cache, config, device, augment, is_fast, **sizes)


NO_CARD = {"what": "a training step in bf16 with torch.compile, and five folds x 100 epochs: no CUDA device, so this code did not run here",
           "target": "4 times faster than float32 with einsum attention; under 3 minutes on an H100"}


def bench_vit():
    "All rows, on one thread."
    threads, config = torch.get_num_threads(), vit_config("paper", n_clinical=N_CLINICAL)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cohort = cohort_of_phantom(folder, 2, (240, 240, 155))
            cache = crops_of_cohort(cohort, folder/"crops", progress=False)
            yield from bench_reading(cohort, cache)
            yield bench_loop(folder)
            yield bench_inference(cache, config, PUBLIC)
            yield bench_step(config, CROP, PUBLIC)
            if torch.cuda.is_available(): yield from card_rows(folder, cache, config, PUBLIC, torch.device("cuda"))
            else: yield NO_CARD
    finally: torch.set_num_threads(threads)
