"""How fast is a step? Ours, diffusers and lucidrains' denoising-diffusion-pytorch, taking turns.

    python -m benchmarks.side_by_side                     # widths 64,128,128, batch 16, 32 x 32
    python -m benchmarks.side_by_side --widths 32,64,64 --rounds 9 --threads 2
    python -m benchmarks.side_by_side --device cuda --widths 128,256,256,256 --batch 128 --best

*ours* is the library's own training step (`Trainer.step`: random numbers, noise, forward, backward,
clipping, Adam, EMA, log). *diffusers* is its `UNet2DModel` with the same architecture and the same
weights, which is checked first, in its tutorial's loop: noise, forward, backward, clipping, the
optimiser, and no EMA. *lucidrains* is its `Unet` and `GaussianDiffusion`, with clipping and EMA as in
its `Trainer`; left out where it is not installed. Neither of the two reads the loss back at each step
here, though their guides do. All run in float32 and in bf16 autocast, with the same fused Adam.

Each is measured as its users run it: ours in channels_last, which `Trainer` and `load_denoiser` set,
the others in the layout that they start with, nothing compiled. With --best each is measured a second
time, all in channels_last and compiled.

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
the network; of a compiled one on a CPU, with the compiler. compile_seconds is what its first step
takes beyond the median, from an empty cache. Lines of code are those of the programs
in benchmarks/users, for the same task. The rate of a plain matrix product in both precisions is
printed first: no network is faster in bf16 than the processor is. A line for each run is added to
nbs/logs/side_by_side.jsonl. Nothing else should run beside it.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from ddpm_nb.device import has_fast_bf16

from .measure import copy_rate, forget_peak, machine, matmul_rate, peak, resident, seconds
from .sides import SIDES, check_same, installed, picture_shape, walk_length
from .users import lines

ROOT = Path(__file__).parents[1]
LOG = ROOT / "nbs" / "logs" / "side_by_side.jsonl"
KINDS = ("train", "sample")
TARGETS = dict(train=1.2, sample=1.3)  # ours against diffusers, in bf16 where that is fast; else 1
SHARE = 0.03  # most of a step that the random numbers, or the EMA, may take
REPEATS = dict(train=1, randomness=3, ema=3)  # calls a round, times --steps; of sampling one walk


def peak_memory(args, side, precision, best, kind):
    "Peak bytes of a few steps, above what there was before the network; in a fresh process."
    importlib.import_module(SIDES[side].package)  # what it imports is not its network
    before = 0 if args.device == "cuda" else resident("VmRSS")
    run = SIDES[side](args, precision, best)
    run.model.train(kind == "train")
    if kind == "sample":
        run.forget_average()  # who samples has one network
    getattr(run, kind)()
    forget_peak(args.device)
    for _ in range(3):
        getattr(run, kind)()
    return peak(args.device) - before


def peak_memory_in_fresh_process(argv, *which):
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.side_by_side", *argv, "--memory", *map(str, which)],
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
    runs = {
        (s, p, best): SIDES[s](args, p, best)
        for best in ([False, True] if args.best else [False])
        for p in args.precision
        for s in sides
    }
    for p in args.precision:
        ours, theirs = (runs[side, p, False].model for side in ("ours", "diffusers"))
        check_same(ours, theirs, picture_shape(args), args.device)
    first, times = clock(args, runs)
    result = dict(
        **machine(args.device),
        diffusers=importlib.metadata.version("diffusers"),
        lucidrains=None,
        **{k: getattr(args, k) for k in "widths attention batch size channels rounds".split()},
        best=args.best,
        parameters={
            side: sum(p.numel() for p in run.model.parameters()) for (side, *_), run in runs.items()
        },
        lines=lines(),
        matmul={p: matmul_rate(p, args.device) for p in ("float32", "bf16")},
        copies=copy_rate(args.device),
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
    out = dict(network=name[0], precision=name[1], best=name[2], compile_seconds=None)
    out["fast_bf16"] = has_fast_bf16(args.device)
    for kind in KINDS:
        steps = walk_length(args) if kind == "sample" else 1
        out[f"{kind}_per_s"] = args.batch * steps / median[name, kind]
        out[f"{kind}_spread"] = spread(times[name, kind])
        reference = median.get((("diffusers", "float32", False), kind))
        out[f"{kind}_ratio"] = reference and reference / median[name, kind]
        equal = median.get((("diffusers", *name[1:]), kind))
        out[f"{kind}_equal"] = equal and equal / median[name, kind]
        memory = None if args.no_memory else peak_memory_in_fresh_process(argv, *name, kind)
        out[f"{kind}_bytes"] = memory
    if name[2]:
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
    show = "{:10} {:9} {:5} {:>15} {:>6} {:>15} {:>6} {:>9} {:>9} {:>13}".format
    r = result
    out = [
        f"{r['device']}, {r['threads']} threads, torch {r['torch']}, diffusers {r['diffusers']}, "
        f"lucidrains {r['lucidrains'] or 'not installed'}",
        f"widths {r['widths']}, attention at {r['attention']}, batch {r['batch']}, "
        f"{r['channels']} x {r['size']} x {r['size']}, {r['rounds']} rounds",
        "parameters: " + ", ".join(f"{k} {v:,}" for k, v in r["parameters"].items()),
        "lines of code of a program: " + ", ".join(f"{k} {v}" for k, v in r["lines"].items()),
        "matrix products: "
        + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in r["matmul"].items())
        + f"; copies {r['copies'] / 1e9:.0f} GB/s",
        "",
        show("", "", "", "training", "", "sampling", "", "training", "sampling", "compiling"),
        show(*"network precision as pictures/s ratio pictures/s ratio MB MB seconds".split()),
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
            show(
                r["network"],
                r["precision"],
                "best" if r["best"] else "used",
                *cells,
                " + ".join(map("{:.1f}".format, compiling)),
            )
        )
    out += [
        "",
        "used: as its users run it; best: channels_last and compiled",
        "ratio: against diffusers in float32, as used; MB: peak memory",
    ]
    return "\n".join(out + [judged(r) for r in result["rows"] if r["network"] == "ours"])


def judged(r):
    "What a row of ours comes to, beside what it should."
    shares = [f"{part} {r[f'{part}_share']:.2%}" for part in ("randomness", "ema")]
    good = max(r["randomness_share"], r["ema_share"]) < SHARE
    text = f"ours in {r['precision']}, {'best' if r['best'] else 'used'}: {', '.join(shares)} of a step"
    text += f" (below {SHARE:.0%}: {yes(good)})"
    if r["train_equal"] is None:
        return text
    fast = r["precision"] == "bf16" and r["fast_bf16"]
    for kind, name in dict(train="training", sample="sampling").items():
        target, ratio = TARGETS[kind] if fast else 1.0, r[f"{kind}_equal"]
        text += f"; {name} {ratio:.2f} times diffusers' (at least {target}: {yes(ratio >= target)})"
    return text


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
    add("--best", action="store_true", help="each also at its best: channels_last, compiled")
    add("--no-memory", action="store_true", help="leave the peak memory out")
    add("--log", type=Path, default=LOG, help="where a line is added")
    add("--memory", nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    unknown = sorted(set(args.precision) - {"float32", "bf16"})
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
        side, precision, best, kind = args.memory
        return print(peak_memory(args, side, precision, best == "True", kind))
    if not installed("lucidrains"):
        print("lucidrains is left out: pip install 'ddpm_nb[bench]'")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        if args.best:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # nothing in it: compiling takes its time
        result = measure(args, argv)
    print(table(result))
    with open(args.log, "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
