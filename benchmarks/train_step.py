"""How fast is a step? Our UNet and diffusers' UNet2DModel, alternating in the same run.

    python -m benchmarks.train_step                     # widths 64,128,128, batch 16, 32 x 32
    python -m benchmarks.train_step --widths 32,64,64 --rounds 9 --threads 2
    python -m benchmarks.train_step --device cuda --widths 128,256,256,256 --batch 128 --compile

Ours is the library's own training step (`Trainer.step`: random numbers, noise, forward, backward,
clipping, Adam, EMA, log). Theirs is what users get out of the box: eager float32, noise, forward,
backward, clipping, AdamW, and no EMA. Both are also run in bf16 autocast. A sampling step is one
call of the network and one ancestral step. Speeds are medians over the rounds; peak memory is that
of a fresh process each, above what was there before the network was built. The rate of a plain
matrix product in both precisions is printed first: no network is faster in bf16 than the processor
is. A line for each run is added to benchmarks/log.jsonl. Nothing else should run beside it.
"""

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from ddpm_nb.data import PictureData
from ddpm_nb.sample import autocast
from ddpm_nb.train import DiffusionConfig, Trainer, step_draws
from ddpm_nb.unet import ModelConfig

LOG = Path(__file__).parent / "log.jsonl"
TARGETS = dict(float32=1.0, bf16=1.3)  # ours in that precision, against theirs in float32
SHARE = 0.03  # most of a step that the scheduler, or the EMA, may take


class Ours:
    "The library's own steps."

    def __init__(self, args, precision):
        base, levels = args.widths[0], len(args.widths)
        model = ModelConfig(
            args.size // 2 ** (levels - 1),
            [w // base for w in args.widths],
            attention_levels(args),
            base,
        )
        config = DiffusionConfig(batch_size=args.batch, precision=precision, compile=args.compile)
        data = PictureData(
            torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8)
        )
        self.trainer, self.precision, self.steps = Trainer(config, model, data), precision, 0
        self.pictures = data.pictures.to(self.trainer.device)
        self.xt = torch.randn(self.pictures.shape, device=self.trainer.device)
        self.model = self.trainer.model

    def train_step(self):
        self.steps += 1
        self.trainer.step(self.steps, self.pictures)

    @torch.no_grad()
    def sample_step(self):
        t = torch.full((len(self.xt),), 500, device=self.xt.device)
        with autocast(self.xt.device, self.precision):
            noise_pred = self.trainer.network(self.xt, t)
        self.trainer.scheduler.sample_prev_timestep(self.xt, noise_pred, 500)

    def randomness(self):
        "What a step draws, and the noise it adds."
        c, x0 = self.trainer.config, self.xt
        t, _, noise = step_draws(
            c.seed, self.steps, c.batch_size, c.timesteps_diff, self.pictures.shape[1:]
        )
        self.trainer.scheduler.add_noise(x0, noise.to(x0.device), t.to(x0.device))

    def ema(self):
        self.trainer.ema.update(self.trainer.model, self.steps)


class Theirs:
    "diffusers' network and scheduler, in its tutorial's loop."

    def __init__(self, args, precision):
        from diffusers import DDPMScheduler, UNet2DModel

        attention = ["Attn" * (i in attention_levels(args)) for i in range(len(args.widths))]
        self.model = UNet2DModel(
            sample_size=args.size,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=args.widths,
            down_block_types=[f"{a}DownBlock2D" for a in attention],
            up_block_types=[f"{a}UpBlock2D" for a in reversed(attention)],
        ).to(args.device)
        self.network = torch.compile(self.model) if args.compile else self.model
        self.scheduler, self.precision = DDPMScheduler(1000), precision
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x0 = torch.randn(args.batch, 3, args.size, args.size, device=args.device)

    def train_step(self):
        self.model.train()
        noise = torch.randn_like(self.x0)
        t = torch.randint(0, 1000, (len(self.x0),), device=self.x0.device)
        xt = self.scheduler.add_noise(self.x0, noise, t)
        with autocast(self.x0.device, self.precision):
            noise_pred = self.network(xt, t).sample
        F.mse_loss(noise_pred.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def sample_step(self):
        self.model.eval()
        with autocast(self.x0.device, self.precision):
            noise_pred = self.network(self.x0, 500).sample
        self.scheduler.step(noise_pred.float(), 500, self.x0)


SIDES = dict(ours=Ours, theirs=Theirs)


def attention_levels(args):
    return [i for i in range(len(args.widths)) if args.size // 2**i == args.attention]


def seconds(step, device, repeats):
    "Seconds a call takes."
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def matmul_rate(dtype, device):
    "What the processor can do: floating-point operations a second in a matrix product."
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device, 1) for _ in range(10))


def device_name(device):
    "The processor's name."
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def resident(key):
    "Bytes this process holds: VmRSS now, VmHWM at most so far."
    # not getrusage: on Linux a child's ru_maxrss starts at what its parent held
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_memory(args, side, precision, kind):
    "Peak bytes of a few steps, above what there was before the network; in a fresh process."
    if side == "theirs":
        importlib.import_module("diffusers.models")  # what it imports is not its network
    before = resident("VmRSS")
    one = SIDES[side](args, precision)
    step = one.train_step if kind == "train" else one.sample_step
    for _ in range(3):
        step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - before


def peak_memory_in_fresh_process(argv, side, precision, kind):
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *argv, "--memory", side, precision, kind],
        capture_output=True,
        text=True,
        check=False,
        cwd=LOG.parent.parent,
    )
    if out.returncode:
        raise RuntimeError(f"the measurement of memory failed:\n{out.stderr}")
    return int(out.stdout.split()[-1])


def measure(args, argv):
    "Everything, as one dict."
    names = [(side, precision) for precision in args.precision for side in SIDES]
    runs = {name: SIDES[name[0]](args, name[1]) for name in names}
    times = {(name, kind): [] for name in names for kind in ("train", "sample")}
    parts = {
        (name, part): [] for name in names if name[0] == "ours" for part in ("randomness", "ema")
    }
    for round_ in range(args.rounds + 1):  # the first round warms up
        for name, run in runs.items():
            for kind in ("train", "sample"):
                took = seconds(
                    getattr(run, f"{kind}_step"),
                    args.device,
                    args.steps * (1 if kind == "train" else 3),
                )
                if round_:
                    times[name, kind].append(took)
            if name[0] == "ours":
                for part in ("randomness", "ema"):
                    took = seconds(getattr(run, part), args.device, 10)
                    if round_:
                        parts[name, part].append(took)
    result = dict(
        device=device_name(args.device),
        matmul={
            str(d).split(".")[1]: matmul_rate(d, args.device)
            for d in (torch.float32, torch.bfloat16)
        },
        torch=torch.__version__,
        diffusers=importlib.import_module("diffusers").__version__,
        threads=torch.get_num_threads(),
        widths=args.widths,
        attention=args.attention,
        batch=args.batch,
        size=args.size,
        rounds=args.rounds,
        compile=args.compile,
        parameters={n[0]: sum(p.numel() for p in r.model.parameters()) for n, r in runs.items()},
        rows=[],
    )
    for name in names:
        row = dict(network=name[0], precision=name[1])
        for kind in ("train", "sample"):
            row[f"{kind}_per_s"] = args.batch / statistics.median(times[name, kind])
            row[f"{kind}_spread"] = spread(times[name, kind])
            if not args.no_memory:
                row[f"{kind}_bytes"] = peak_memory_in_fresh_process(argv, *name, kind)
        if name[0] == "ours":
            for part in ("randomness", "ema"):
                row[f"{part}_share"] = statistics.median(parts[name, part]) / statistics.median(
                    times[name, "train"]
                )
        result["rows"].append(row)
    theirs = next(
        (r for r in result["rows"] if (r["network"], r["precision"]) == ("theirs", "float32")), None
    )
    for row in result["rows"]:
        for kind in ("train", "sample"):
            if theirs:
                row[f"{kind}_ratio"] = row[f"{kind}_per_s"] / theirs[f"{kind}_per_s"]
    return result


def spread(values):
    "Half the distance between the quartiles, as a share of the median."
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)


def table(result):
    "The numbers as lines to read."
    show = "{:8} {:9} {:>18} {:>8} {:>18} {:>8} {:>10} {:>10}".format
    lines = [
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}, "
        f"diffusers {result['diffusers']}" + ", compiled" * result["compile"],
        f"widths {result['widths']}, attention at {result['attention']}, batch {result['batch']}, "
        f"{result['size']} x {result['size']}, {result['rounds']} rounds; parameters: "
        + ", ".join(f"{k} {v:,}" for k, v in result["parameters"].items()),
        "matrix products: "
        + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in result["matmul"].items()),
        "",
        show(
            "network", "precision", "training", "ratio", "sampling", "ratio", "training", "sampling"
        ),
        show("", "", "pictures/s", "", "pictures/s", "", "peak MB", "peak MB"),
    ]
    for r in result["rows"]:
        speeds = [
            f"{r[f'{k}_per_s']:.1f} +- {100 * r[f'{k}_spread']:.0f}%" for k in ("train", "sample")
        ]
        ratios = [
            f"{r[f'{k}_ratio']:.2f}" if f"{k}_ratio" in r else "" for k in ("train", "sample")
        ]
        memory = [
            f"{r[f'{k}_bytes'] / 1e6:.0f}" if f"{k}_bytes" in r else "" for k in ("train", "sample")
        ]
        lines.append(
            show(r["network"], r["precision"], speeds[0], ratios[0], speeds[1], ratios[1], *memory)
        )
    lines += ["", "ratio: against theirs in float32"]
    for r in result["rows"]:
        if r["network"] != "ours":
            continue
        shares = ", ".join(f"{part} {r[f'{part}_share']:.2%}" for part in ("randomness", "ema"))
        worst = max(r["randomness_share"], r["ema_share"])
        who, target = f"ours in {r['precision']}: ", TARGETS[r["precision"]]
        lines.append(
            f"{who}of a training step, {shares} (below {SHARE:.0%}: {verdict(worst < SHARE)})"
        )
        if "train_ratio" in r:
            met = [
                f"{kind}ing {verdict(r[f'{key}_ratio'] >= target)}"
                for kind, key in (("train", "train"), ("sampl", "sample"))
            ]
            lines.append(f"{who}at least {target} times theirs in float32: {', '.join(met)}")
    return "\n".join(lines)


def verdict(good):
    return "yes" if good else "NO"


def parse(argv):
    "The command line."

    def numbers(text):
        return [int(n) for n in text.split(",")]

    p = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__.split("\n")[0]
    )
    p.add_argument(
        "--widths", type=numbers, default=[64, 128, 128], help="channels of each level: 64,128,128"
    )
    p.add_argument(
        "--attention", type=int, default=16, help="picture size of the level that has attention"
    )
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--size", type=int, default=32, help="height and width of the pictures")
    p.add_argument(
        "--precision", type=lambda s: s.split(","), default=["float32", "bf16"], help="float32,bf16"
    )
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument(
        "--steps",
        type=int,
        default=3,
        help="training steps a round (three times as many of sampling)",
    )
    p.add_argument("--threads", type=int, help="CPU threads; left out: torch's choice")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile both")
    p.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    p.add_argument("--log", type=Path, default=LOG, help="where a line is added")
    p.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    unknown = sorted(set(args.precision) - set(TARGETS))
    if unknown:
        p.error(f"--precision: expected float32, bf16 or both; got {', '.join(unknown)}")
    if any(w % args.widths[0] for w in args.widths):
        p.error("--widths: expected multiples of the first")
    if args.size % 2 ** (len(args.widths) - 1):
        p.error("--size: expected a size that every level halves")
    if args.rounds < 1 or args.steps < 1:
        p.error("--rounds, --steps: expected at least 1")
    return args


def main(argv=None):
    "Measures, prints, logs."
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if importlib.util.find_spec("diffusers") is None:
        sys.exit("benchmarks.train_step compares with diffusers: pip install 'ddpm_nb[interop]'")
    warnings.filterwarnings("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        return print(peak_memory(args, *args.memory))
    result = measure(args, argv)
    print(table(result))
    with open(args.log, "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
