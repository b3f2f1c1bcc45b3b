"""All that a GPU can tell about this library, in parts that stop at their own limit.

    python -m benchmarks.gpu --minutes 9 --out gpu                    # all parts, in this order
    python -m benchmarks.gpu --minutes 6 --out gpu check train --data-dir data
    python -m benchmarks.gpu --minutes 9 --out gpu peers throughput

check       (2 minutes)  the GPU, what it can do at most, every command once, the tests that nothing waits
train       (4 minutes)  fashion_mnist for as long as that allows, evaluated, its weights in half precision
peers       (4 minutes)  cifar10's network at one batch: ours and diffusers, eager and compiled; lucidrains
throughput  (the rest)   our networks by batch: eager, compiled, as CUDA graphs

Each row is added to OUT/gpu.jsonl as soon as it is known, with the machine's name. A part that is not
done at its limit is ended; what it has written stays. Seconds of compiling are told apart from those of
a step. `mfu` is the share of the measured rate of bf16 matrix products that the network's own
operations come to (three times those of an answer, for a training step). With --small everything is
tiny, for a look on a CPU.
"""

import argparse
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
MINUTES = dict(check=2, train=4, peers=4, throughput=None)
PRECISIONS = ("float32", "tf32", "bf16")


class Part:
    "Where a part writes its rows, and how long it still has."

    def __init__(self, args):
        self.name, self.out, self.small = args.part, args.out, args.small
        self.data_dir, self.device = args.data_dir, args.device
        self.end = args.end or time.monotonic() + 60 * args.minutes

    def left(self):
        "Seconds."
        return self.end - time.monotonic()

    def fresh(self, name):
        "A folder of that name; what an earlier run left in it is gone."
        shutil.rmtree(self.out / name, ignore_errors=True)
        return self.out / name

    def row(self, kind, **values):
        "Writes a row, and shows it."
        from .measure import machine

        row = dict(part=self.name, kind=kind, **machine(self.device), **values)
        with open(self.out / "gpu.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{kind}: {', '.join(shown)}", flush=True)
        return row

    def command(self, name, *args, timeout=60):
        "A command of the library in a process of its own, as a row."
        code = (
            f"import sys; sys.argv[0] = 'ddpm-{name}'; from ddpm_nb import cli; cli.main_{name}()"
        )
        return self.process(f"ddpm-{name}", [sys.executable, "-c", code, *map(str, args)], timeout)

    def process(self, name, argv, timeout):
        began = time.monotonic()
        try:
            done = subprocess.run(
                argv,
                capture_output=True,
                text=True,
                timeout=max(1, min(timeout, self.left())),
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                },
            )
            status, said = done.returncode, (done.stdout + done.stderr).strip()
        except subprocess.TimeoutExpired as e:
            status, said = "too long", (e.stdout or b"").decode(errors="replace")
        said = said.replace("\r", "\n").splitlines()[-12 if status else -1 :]
        took = round(time.monotonic() - began, 1)
        self.row("command", name=name, status=status, seconds=took, said="\n".join(said))
        return status == 0


# ---- check


def check(part):
    "The GPU, its rates, every command once, and whether a step waits."
    from .measure import copy_rate, matmul_rate

    rates = {p: matmul_rate(p, part.device) / 1e12 for p in PRECISIONS}
    part.row("rates", **{f"{p}_tflops": r for p, r in rates.items()},
             copy_gb_s=copy_rate(part.device, 64 if part.small else 1024) / 1e9)  # fmt: skip
    if part.device == "cuda":
        part.row("memory", gigabytes=torch.cuda.get_device_properties(0).total_memory / 1e9)
    run, where = part.fresh("check-run"), ("--device", part.device)
    short = "--max-steps 20 --decay-start 10 --decay-end 20 --log-every 10 --save-every 10".split()
    part.command("train", "digits", *short, "--compile", "off", "--out-dir", run, *where)
    part.command(
        "train", "digits", *short, "--resume", "--max-steps", "20", "--out-dir", run, *where
    )
    part.command("sample", run, "--n", "4", "--steps", "3", "--out", part.out / "check.png", *where)
    part.command("sample", "digits" if part.small else "fashion_mnist", "--n", "64", "--precision",
                 "auto", "--out", part.out / "clothes.png", *where)  # fmt: skip
    part.command(
        "evaluate", run, "--bits-n", "4", "--strata", "3", "--n", "8", "--steps", "3", *where
    )
    part.command("diagnose", "digits", *where)
    part.command("export", run, part.fresh("check-export"))
    part.command("import", part.out / "check-export", part.fresh("check-import"))
    part.process("pytest", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                            "-k", "on_a_gpu", "tests/test_no_waits.py"], 90)  # fmt: skip


# ---- train


def half_weights(step, file):
    "A checkpoint's averaged weights, in half precision, with its config beside them."
    from safetensors.torch import load_file, save_file

    weights = load_file(step / "model.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, file)
    file.with_suffix(".json").write_text((step / "config.json").read_text())


def train(part):
    "A run as long as the part allows, its evaluation, its weights."
    from ddpm_nb.train import DiffusionConfig, train_diffusion
    from ddpm_nb.unet import ModelConfig

    preset = "digits" if part.small else "fashion_mnist"
    network = ModelConfig.preset(preset)
    batch = dict(batch_size=16 if part.small else 256, data_dir=part.data_dir)

    def trained(name, steps, **fields):
        c = DiffusionConfig.preset(
            preset, out_dir=str(part.fresh(name)), max_steps=steps, warmup_steps=steps // 20,
            decay_start=steps * 2 // 3, decay_end=steps, save_every=steps, sample_every=0,
            log_every=max(1, steps // 50), **batch, **fields,
        )  # fmt: skip
        began = time.monotonic()
        step = train_diffusion(c, network, progress=False, device=part.device)
        lines = [json.loads(line) for line in open(part.out / name / "log.jsonl")]
        late = [line["pictures_per_second"] for line in lines[len(lines) // 2 :]]
        return step, statistics.median(late), time.monotonic() - began

    probe = 10 if part.small else 200
    _, speed, took = trained("probe", probe)
    first = took - probe * batch["batch_size"] / speed  # compiling, and what else is done once
    for_evaluation = 5 if part.small else 75
    steps = int((part.left() - for_evaluation - first - 10) * speed / batch["batch_size"])
    steps = 20 if part.small else max(200, steps)
    step, speed, took = trained("run", steps)
    part.row("train", preset=preset, steps=steps, seconds=took, pictures_per_s=speed, first=first,
             **batch)  # fmt: skip
    half_weights(step, part.out / f"{preset}-half.safetensors")
    (part.out / f"{preset}-log.jsonl").write_text((part.out / "run" / "log.jsonl").read_text())
    n = "8" if part.small else "10000"
    where = ["--device", part.device, *(["--data-dir", part.data_dir] if part.data_dir else [])]
    part.command("sample", step, "--n", "64", "--out", part.out / f"{preset}.png", *where[:2])
    bits = (
        ("--bits-n", "8", "--strata", "3") if part.small else ("--bits-n", "1000", "--strata", "20")
    )
    part.command("evaluate", step, *bits, "--n", n,
                 "--out", part.out / "evaluation.json", *where, timeout=240)  # fmt: skip


# ---- peers


def start_over(device):
    "Nothing of the network before is left, and a new peak of memory is counted."
    from .measure import forget_peak

    torch.compiler.reset()
    gc.collect()  # a compiled network is held by itself
    if device == "cuda":
        torch.cuda.empty_cache()
    forget_peak(device)


def peers(part):
    "cifar10's network in the hands of three libraries."
    from . import side_by_side as sbs
    from .measure import peak
    from .sides import SIDES, check_same, installed, picture_shape

    size = "--widths 128,256,256,256 --batch 128"
    size = "--widths 8,16 --batch 2 --size 16 --attention 8" if part.small else size
    args = sbs.parse([*size.split(), "--device", part.device, "--steps", "3"])
    ours, theirs = (SIDES[s](args, "float32").model for s in ("ours", "diffusers"))
    check_same(ours, theirs, picture_shape(args), part.device)
    del ours, theirs
    for compiled in (False, True):
        for precision in PRECISIONS[::-1]:
            for side in SIDES:
                skipped = compiled and (side == "lucidrains" or part.small)
                if skipped or not installed(side) or part.left() < (60 if compiled else 10):
                    continue
                start_over(part.device)
                run, values = SIDES[side](args, precision, compiled), {}
                for kind in sbs.KINDS:
                    work, pictures = getattr(run, kind), args.batch
                    pictures *= sbs.walk_length(args) if kind == "sample" else 1
                    run.model.train(kind == "train")
                    first = sbs.seconds(work, part.device)
                    repeats = args.steps if kind == "train" and not part.small else 1
                    times = [
                        sbs.seconds(work, part.device, repeats)
                        for _ in range(1 if part.small else 7)
                    ]
                    values |= {
                        f"{kind}_per_s": pictures / statistics.median(times),
                        f"{kind}_spread": sbs.spread(times),
                        f"{kind}_first": first,
                    }
                part.row(side, precision=precision, compiled=compiled, batch=args.batch,
                         memory=peak(part.device), **values)  # fmt: skip
                del run, work


# ---- throughput


def step_seconds(part, preset, network, batch, how):
    "The first training step's seconds, the median of those after it, and the peak of memory."
    from ddpm_nb.data import PictureData
    from ddpm_nb.train import DiffusionConfig, Trainer

    from .measure import peak, seconds

    start_over(part.device)
    config = DiffusionConfig.preset(preset, batch_size=batch, compile=how, precision="bf16")
    data = PictureData(torch.zeros(batch, *network.picture_shape, dtype=torch.uint8))
    trainer = Trainer(config.new_denoiser(network), data, config)
    ready = trainer.batch(1, data.pictures)
    first = seconds(lambda: trainer.step(1, ready), part.device)
    repeats = 1 if part.small else 5
    times = [seconds(lambda: trainer.step(2, ready), part.device, repeats) for _ in range(5)]
    return first, statistics.median(times), peak(part.device)


def throughput(part):
    "Our networks, by batch and by how their work is given out."
    from ddpm_nb.unet import ModelConfig

    from .measure import matmul_rate, operations

    best = matmul_rate("bf16", part.device)
    batches = dict(cifar10=(64, 128, 256, 512), digits=(64, 1024), fashion_mnist=(64, 256, 1024),
                   ffhq128=(8, 32))  # fmt: skip
    if part.small:
        batches = dict(digits=(2,))
    for preset, sizes in batches.items():
        network = ModelConfig.preset(preset)
        flops, attention = operations(network)
        for batch in sizes:
            for how in ("off",) if part.small else ("off", "on", "graphs"):
                if part.left() < (10 if how == "off" else 90):
                    continue
                row = dict(
                    preset=preset, batch=batch, compile=how, flops=flops, attention=attention
                )
                try:
                    first, took, memory = step_seconds(part, preset, network, batch, how)
                except torch.OutOfMemoryError:
                    part.row("throughput", **row, fits=False)
                    continue
                part.row("throughput", **row, fits=True, first=first, memory=memory,
                         pictures_per_s=batch / took, mfu=3 * flops * batch / took / best)  # fmt: skip


PARTS = dict(check=check, train=train, peers=peers, throughput=throughput)


def parse(argv):
    p = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    p.add_argument("--minutes", type=float, default=9.0, help="for all parts together (9)")
    p.add_argument("--out", type=Path, required=True, help="folder for rows, weights, pictures")
    p.add_argument("--data-dir", help="where Fashion-MNIST is")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--small", action="store_true", help="everything tiny, to try it on a CPU")
    p.add_argument("--part", help=argparse.SUPPRESS)
    p.add_argument("--end", type=float, help=argparse.SUPPRESS)  # of the part, by the clock
    args = p.parse_args(argv)
    if unknown := [name for name in args.parts if name not in PARTS]:
        p.error(f"PART: expected {', '.join(PARTS)}; got {', '.join(unknown)}")
    if not args.minutes > 0:
        p.error(f"--minutes: expected a number above 0; got {args.minutes}")
    return args


def main(argv=None):
    "Each part in a process of its own, with its own limit."
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"  # where there is a GPU, Trainer would take it
    if args.part:
        return PARTS[args.part](Part(args))
    end = time.monotonic() + 60 * args.minutes
    for name in args.parts or PARTS:
        minutes = min(MINUTES[name] or 1e9, (end - time.monotonic()) / 60)
        if minutes <= 0.05:
            print(f"{name}: no time is left")
            continue
        limit = time.monotonic() + 60 * minutes
        own = ["--part", name, "--end", str(limit - 2), "--out", str(args.out)]
        own += ["--device", args.device, *(["--small"] if args.small else [])]
        own += ["--data-dir", str(Path(args.data_dir).resolve())] if args.data_dir else []
        print(f"== {name}, {minutes:.1f} minutes at most", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", *own]
        running = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            if status := running.wait(60 * minutes):
                print(f"{name}: ended with status {status}")
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # the part, and a command that it has started
            running.wait()
            print(f"{name}: ended at its limit; its rows so far are kept")


if __name__ == "__main__":
    main()
