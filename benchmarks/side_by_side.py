"""How fast is a step? Ours, diffusers and lucidrains' denoising-diffusion-pytorch, taking turns.

    python -m benchmarks.side_by_side                     # widths 64,128,128, batch 16, 32 x 32
    python -m benchmarks.side_by_side --widths 32,64,64 --rounds 9 --threads 2
    python -m benchmarks.side_by_side --device cuda --widths 128,256,256,256 --batch 128 --compile

*ours* is the library's own training step (`Trainer.step`: random numbers, noise, forward, backward,
clipping, Adam, EMA, log). *diffusers* is its `UNet2DModel` with the same architecture and the same
weights, which is checked first, in its tutorial's loop: noise, forward, backward, clipping, AdamW,
and no EMA. *lucidrains* is its `Unet` and `GaussianDiffusion`, with Adam, clipping and EMA as in its
`Trainer`; left out where it is not installed. Neither of the two reads the loss back at each step
here, though their guides do. All run in float32 and in bf16 autocast.

Sampling is timed in walks of a few ancestral steps, from noise to pictures on the CPU, divided by
their number. *ours* is `sample`: each picture has a stream of random numbers of its own, drawn a
step ahead in a thread. *diffusers* is the loop of its pipeline, *lucidrains* its `p_sample`; both
draw from one generator.

What cannot be made the same with lucidrains: it takes our widths (`dim`, `dim_mults`) and has full
attention where we have it, but the other levels have linear attention, not none. Attention comes
once a level and way, not after every block, with 4 heads of 32 channels, not one head of all of
them. There are two blocks a level on the way up, not three, and on the way down a level's blocks
are as wide as the level above. Norms are RMS norms after the convolution, the time scales and
shifts, the first convolution is 7 x 7, and halving is a rearrangement. Its flash_attn is off, as by
default: on a GPU it has no float32. The counts of parameters show what that comes to.

Speeds are medians over the rounds. Peak memory is that of a fresh process each, above what was
there before the network was built, from the second step on; in sampling without an average beside
the network; on a CPU, with --compile, with the compiler. With --compile, compile_seconds is what
the first step takes beyond the median, from an empty cache. Lines of code are those of the programs
in benchmarks/users, for the same task. The rate of a plain matrix product in both precisions is
printed first: no network is faster in bf16 than the processor is. A line for each run is added to
nbs/logs/side_by_side.jsonl. Nothing else should run beside it.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from .sides import SIDES, check_same, installed, picture_shape, walk_length
from .users import lines

ROOT = Path(__file__).parents[1]
LOG = ROOT / "nbs" / "logs" / "side_by_side.jsonl"
KINDS = ("train", "sample")
TARGETS = dict(float32=1.0, bf16=1.3)  # ours in that precision, against diffusers in float32
SHARE = 0.03  # most of a step that the random numbers, or the EMA, may take
REPEATS = dict(train=1, randomness=3, ema=3)  # calls a round, times --steps; of sampling one walk


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
    importlib.import_module(SIDES[side].package)  # what it imports is not its network
    before = resident("VmRSS")
    run = SIDES[side](args, precision)
    run.model.train(kind == "train")
    if kind == "sample":
        run.forget_average()  # who samples has one network
    getattr(run, kind)()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux has it: VmHWM starts anew
            Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        getattr(run, kind)()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - before


def peak_memory_in_fresh_process(argv, side, precision, kind):
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.side_by_side", *argv, "--memory", side, precision, kind],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if out.returncode:
        raise RuntimeError(f"the measurement of memory failed:\n{out.stderr}")
    return int(out.stdout.split()[-1])


def measure(args, argv):
    "Everything, as one dict."
    sides = [side for side in SIDES if installed(side)]
    runs = {(s, p): SIDES[s](args, p) for p in args.precision for s in sides}
    for p in args.precision:
        ours, theirs = (runs[side, p].model for side in ("ours", "diffusers"))
        check_same(ours, theirs, picture_shape(args), args.device)
    first, times = clock(args, runs)
    result = dict(
        device=device_name(args.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        diffusers=importlib.metadata.version("diffusers"),
        lucidrains=None,
        **{k: getattr(args, k) for k in "widths attention batch size channels rounds".split()},
        compile=args.compile,
        parameters={
            side: sum(p.numel() for p in run.model.parameters()) for (side, _), run in runs.items()
        },
        lines=lines(),
        matmul={k: matmul_rate(getattr(torch, k), args.device) for k in ("float32", "bfloat16")},
        targets=TARGETS,
        rows=[row(args, argv, name, first, times) for name in runs],
    )
    if "lucidrains" in sides:
        result["lucidrains"] = importlib.metadata.version("denoising-diffusion-pytorch")
    return result


def clock(args, runs):
    "Seconds of the first call of each part, and of those in the rounds; by turns."
    first, times = {}, {(name, part): [] for name, run in runs.items() for part in run.parts}
    for round_ in range(-1, args.rounds):  # the first one compiles and warms up
        for name, run in runs.items():
            for part in run.parts:
                step = getattr(run, part)
                repeats = 1 if part == "sample" else args.steps * REPEATS[part]
                run.model.train(part == "train")
                if round_ < 0:
                    first[name, part] = seconds(step, args.device, 1)
                took = seconds(step, args.device, repeats)
                if round_ >= 0:
                    times[name, part].append(took)
    return first, times


def row(args, argv, name, first, times):
    "What there is to say of one side in one precision."
    median = {key: statistics.median(values) for key, values in times.items()}
    out = dict(network=name[0], precision=name[1], compile_seconds=None)
    for kind in KINDS:
        steps = walk_length(args) if kind == "sample" else 1
        out[f"{kind}_per_s"] = args.batch * steps / median[name, kind]
        out[f"{kind}_spread"] = spread(times[name, kind])
        reference = median.get((("diffusers", "float32"), kind))
        out[f"{kind}_ratio"] = reference and reference / median[name, kind]
        memory = None if args.no_memory else peak_memory_in_fresh_process(argv, *name, kind)
        out[f"{kind}_bytes"] = memory
    if args.compile:
        out["compile_seconds"] = {k: first[name, k] - median[name, k] for k in KINDS}
    if name[0] == "ours":
        for part in ("randomness", "ema"):
            out[f"{part}_share"] = median[name, part] / median[name, "train"]
    return out


def spread(values):
    "Half the distance between the quartiles, as a share of the median."
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)


def table(result):
    "The numbers as lines to read."
    show = "{:10} {:9} {:>15} {:>6} {:>15} {:>6} {:>9} {:>9} {:>13}".format
    r = result
    out = [
        f"{r['device']}, {r['threads']} threads, torch {r['torch']}, diffusers {r['diffusers']}, "
        f"lucidrains {r['lucidrains'] or 'not installed'}" + ", compiled" * r["compile"],
        f"widths {r['widths']}, attention at {r['attention']}, batch {r['batch']}, "
        f"{r['channels']} x {r['size']} x {r['size']}, {r['rounds']} rounds",
        "parameters: " + ", ".join(f"{k} {v:,}" for k, v in r["parameters"].items()),
        "lines of code of a program: " + ", ".join(f"{k} {v}" for k, v in r["lines"].items()),
        "matrix products: "
        + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in r["matmul"].items()),
        "",
        show("", "", "training", "", "sampling", "", "training", "sampling", "compiling"),
        show(
            *"network precision pictures/s ratio pictures/s ratio".split(), *["MB"] * 2, "seconds"
        ),
    ]
    for r in result["rows"]:
        cells = []
        for k in KINDS:
            cells.append(f"{r[f'{k}_per_s']:.1f} +- {100 * r[f'{k}_spread']:.0f}%")
            cells.append("" if r[f"{k}_ratio"] is None else f"{r[f'{k}_ratio']:.2f}")
        memory = [r[f"{k}_bytes"] for k in KINDS]
        cells += ["" if m is None else f"{m / 1e6:.0f}" for m in memory]
        compiling = (r["compile_seconds"] or {}).values()
        out.append(
            show(r["network"], r["precision"], *cells, " + ".join(map("{:.1f}".format, compiling)))
        )
    out += ["", "ratio: against diffusers in float32; MB: peak memory"]
    return "\n".join(out + [judged(r) for r in result["rows"] if r["network"] == "ours"])


def judged(r):
    "What a row of ours comes to, beside what it should."
    shares = [f"{part} {r[f'{part}_share']:.2%}" for part in ("randomness", "ema")]
    good = max(r["randomness_share"], r["ema_share"]) < SHARE
    text = (
        f"ours in {r['precision']}: {', '.join(shares)} of a step (below {SHARE:.0%}: {yes(good)})"
    )
    if r["train_ratio"] is None:
        return text
    target = TARGETS[r["precision"]]
    train, sample = (yes(r[f"{kind}_ratio"] >= target) for kind in KINDS)
    return f"{text}; at least {target} times diffusers: training {train}, sampling {sample}"


def yes(good):
    return "yes" if good else "NO"


def parse(argv):
    "The command line."

    def numbers(text):
        return [int(n) for n in text.split(",")]

    p = argparse.ArgumentParser(
        "python -m benchmarks.side_by_side", description=__doc__.split("\n")[0]
    )
    add = p.add_argument
    add("--widths", type=numbers, default=[64, 128, 128], help="channels a level: 64,128,128")
    add("--attention", type=int, default=16, help="picture size of the level that has attention")
    add("--batch", type=int, default=16)
    add("--size", type=int, default=32, help="height and width of the pictures")
    add("--channels", type=int, default=3, help="of the pictures: 1 grey, 3 RGB")
    add(
        "--precision",
        type=lambda s: s.split(","),
        default=["float32", "bf16"],
        help="float32,bf16",
    )
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=3, help="training steps a round; of sampling, 3 times as many")
    add("--threads", type=int, help="CPU threads; left out: torch's choice")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="torch.compile all networks")
    add("--no-memory", action="store_true", help="leave the peak memory out")
    add("--log", type=Path, default=LOG, help="where a line is added")
    add("--memory", nargs=3, help=argparse.SUPPRESS)
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
    if not installed("diffusers"):
        sys.exit("benchmarks.side_by_side needs diffusers: pip install 'ddpm_nb[interop]'")
    warnings.filterwarnings("ignore")
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"  # where there is a GPU, our Trainer would take it
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        return print(peak_memory(args, *args.memory))
    if not installed("lucidrains"):
        print("lucidrains is left out: pip install 'ddpm_nb[bench]'")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        if args.compile:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # nothing in it: compiling takes its time
        result = measure(args, argv)
    print(table(result))
    with open(args.log, "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
