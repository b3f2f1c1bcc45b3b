"""How the cost of a step grows, what memory can be traded for, and whether pictures come fast enough.

    python -m benchmarks.growth size width batch steps data busy    # half an hour on two cores
    python -m benchmarks.growth memory --batch 16 --rounds 1        # as long

size, width, batch   a training step and a sampling step of a network of three levels (--width at the
                     top, twice that below, attention at half size), one of the three varied
steps                a walk of so many steps
memory               a preset's training step with grad_accumulation and with checkpointing
data                 a folder of JPEG files, read by so many workers, beside a training step at that size
busy                 training on digits with one thread and with two, alone and beside a process that
                     computes all the time; threads that wait may spin or sleep

Each point is measured in a process of its own: pictures a second (medians), peak memory above what was
there before the network, operations of the network a picture, attention's share of these and of the
time of a training step (by torch's profiler). A line a point is added to nbs/logs/growth.jsonl as soon
as it is known. Nothing else should run beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm_nb.data import PictureData, batches, load_data
from ddpm_nb.sample import sample
from ddpm_nb.train import DiffusionConfig, Trainer
from ddpm_nb.unet import ModelConfig

from .measure import forget_peak, machine, operations, peak, resident, seconds
from .speed import profiled

ROOT = Path(__file__).parents[1]
LOG = ROOT / "nbs" / "logs" / "growth.jsonl"


def points(args):
    "{part: the points of it}; a point is what `measured` gets."
    base = dict(size=args.size, width=args.width, batch=args.batch)

    def varied(name, values):
        return [dict(base, **{name: v}) for v in values]

    parts = [(1, False), (1, True), (4, False), (4, True)]
    memory = dict(preset=args.preset, batch=args.batch)
    return dict(
        size=varied("size", [args.size // 2, args.size, 2 * args.size, 4 * args.size]),
        width=varied("width", [args.width // 2, args.width, 2 * args.width]),
        batch=varied("batch", [1, 2, 4, 8, 16, 32]),
        steps=varied("steps", [1, 2, 5, 10, 20, 50]),
        memory=[dict(memory, grad_accumulation=n, checkpointing=c) for n, c in parts],
        data=[
            dict(size=2 * args.size, width=args.width, batch=8, workers=n) for n in (None, 0, 1, 2)
        ],
        busy=[
            dict(threads=n, policy=p, busy=b)
            for b in (False, True)
            for n, p in ((1, None), (2, "ACTIVE"), (2, "PASSIVE"))
        ],
    )


def network(point):
    "Its config."
    if "preset" in point:
        return ModelConfig.preset(point["preset"])
    return ModelConfig(point["size"] // 4, (1, 2, 2), (1,), point["width"])


def trainer_of(config, batch, **fields):
    "In float32, on random pictures."
    c = DiffusionConfig(batch_size=batch, precision="float32", compile="off", **fields)
    data = torch.randint(0, 256, (batch, *config.picture_shape), dtype=torch.uint8)
    return Trainer(c.new_denoiser(config), PictureData(data), c)


def median(step, rounds):
    step()  # warm
    return statistics.median(seconds(step, "cpu") for _ in range(rounds))


def measured(point, rounds):
    "What is found at a point of size, width, batch, steps or memory."
    config, n = network(point), point["batch"]
    flops, attention = operations(config)
    before = resident("VmRSS")
    fields = {k: point[k] for k in ("grad_accumulation", "checkpointing") if k in point}
    trainer = trainer_of(config, n, **fields)
    batch = trainer.batch(1, trainer.data.pictures)
    out = dict(flops=flops, attention=attention / flops)
    out["parameters"] = sum(p.numel() for p in trainer.parameters)
    if "steps" not in point:
        trainer.step(1, batch)  # from here on Adam has its moments
        forget_peak("cpu")
        took = median(lambda: trainer.step(1, batch), rounds)
        out |= dict(train_per_s=n / took, train_bytes=peak("cpu") - before)
    if "preset" in point:
        return out
    if "steps" not in point:
        spent = profiled(argparse.Namespace(device="cpu", rounds=2), trainer)
        out["attention_time"] = spent.get("attention", 0.0) / sum(spent.values())
    steps = point.get("steps", 1)
    shape = config.picture_shape
    draw = lambda: sample(trainer.averaged, n, shape=shape, steps=steps, batch_size=n)  # noqa: E731
    return out | dict(walk_per_s=n / median(draw, rounds))


def photos(folder, n=400, size=(384, 512)):
    "JPEG files with blobs of several sizes and with grain: 130 kB each, more than most photos."
    rng = np.random.default_rng(0)
    for i in range(n):
        x = rng.normal(128, 8, (*size, 3))
        for k in (4, 16, 64):
            coarse = rng.normal(0, 128 / k**0.5, (size[0] // k, size[1] // k, 3))
            x += np.kron(coarse, np.ones((k, k, 1)))
        Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.jpg", quality=90)


def measured_data(point, rounds):
    "Pictures a second: a training step's where no workers are named, else the folder's."
    n, size, times = 64, point["size"], []
    if point["workers"] is None:
        return dict(train_per_s=measured(point, rounds)["train_per_s"])
    with tempfile.TemporaryDirectory() as folder:
        photos(Path(folder))
        sample_bytes = statistics.mean(f.stat().st_size for f in Path(folder).iterdir())
        began = time.perf_counter()
        data = load_data(folder, size=size)
        opened = len(data) / (time.perf_counter() - began)
        each = batches(data, 0, n, 0, 8 + 16 * rounds, num_workers=point["workers"])
        for _ in range(8):
            next(each)  # the workers start, and read ahead
        for _ in range(rounds):
            began = time.perf_counter()
            for _ in range(16):
                next(each)
            times.append(time.perf_counter() - began)
        each.close()
    took = statistics.median(times)
    return dict(data_per_s=16 * n / took, opened_per_s=opened, file_bytes=sample_bytes)


def measured_busy(point, rounds):
    "Digits a second, training; beside a process that never waits if asked for."
    beside = [sys.executable, "-c", "while True: pass"]
    other = subprocess.Popen(beside) if point["busy"] else None
    try:
        torch.set_num_threads(point["threads"])
        trainer = trainer_of(ModelConfig.preset("digits"), 64)
        batch = trainer.batch(1, trainer.data.pictures)
        took = median(lambda: trainer.step(1, batch), 10 * rounds)
        return dict(train_per_s=64 / took, threads=point["threads"])
    finally:
        if other:
            other.kill()
            other.wait()


def found_at(part, point, rounds):
    "What is measured at a point, in this process."
    find = dict(data=measured_data, busy=measured_busy).get(part, measured)
    return find(point, rounds)


def in_fresh_process(part, point, rounds):
    "A point's row."
    env = dict(os.environ, ACCELERATE_USE_CPU="1")
    if point.get("policy"):
        env["OMP_WAIT_POLICY"] = point["policy"]
    argv = [sys.executable, "-m", "benchmarks.growth", part, "--rounds", str(rounds), "--point"]
    done = subprocess.run(
        [*argv, json.dumps(point)], capture_output=True, text=True, check=False, cwd=ROOT, env=env
    )
    if done.returncode:
        raise RuntimeError(f"{part} {point} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def shown(row):
    "A row as a line to read."
    say = dict(
        train_per_s="training {:.2f} pictures/s",
        train_bytes="{:.2e} bytes",
        walk_per_s="walk {:.2f} pictures/s",
        attention="attention {:.1%} of the operations",
        attention_time="{:.1%} of the time",
        data_per_s="{:.0f} pictures/s read",
        opened_per_s="{:.0f} files/s looked at",
    )
    what = ", ".join(f"{k} {v}" for k, v in row["point"].items())
    return f"{what}: " + ", ".join(text.format(row[k]) for k, text in say.items() if k in row)


def parse(argv):
    p = argparse.ArgumentParser("python -m benchmarks.growth", description=__doc__.split("\n")[0])
    p.add_argument("parts", nargs="*", help="which; left out: all")
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--preset", default="ffhq128", help="the network of memory")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--log", type=Path, default=LOG)
    p.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    known = points(args)
    if wrong := set(args.parts) - set(known):
        p.error(f"parts: expected {', '.join(known)}; got {', '.join(sorted(wrong))}")
    return args


def main(argv=None):
    args = parse(argv)
    if args.point:
        return print(json.dumps(found_at(args.parts[0], args.point, args.rounds)))
    for part, each in points(args).items():
        for point in each if part in args.parts or not args.parts else []:
            row = dict(**machine("cpu"), part=part, point=point)
            row |= in_fresh_process(part, point, args.rounds)
            with open(args.log, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            print(shown(row), flush=True)


if __name__ == "__main__":
    main()
