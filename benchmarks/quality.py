"""How long until 64 pictures of full quality are there? Ours and diffusers, with the same weights.

    python -m benchmarks.quality digits
    python -m benchmarks.quality fashion_mnist

diffusers as its users run it: `DDPMPipeline` with 1,000 steps, and `DDIMPipeline` with 50. Ours with
`sample`, in the fewest steps that are as good, by any sampler. What a walk of theirs is worth is what
the same walk is worth here: `ancestral` in 1,000 steps, `ddim` in 50, both evenly spaced (diffusers'
DDIM starts at step 981 if nothing is said, and ours at 1,000, which is the better one). As good is within 10% of it, or better, in FID and in the FID of
pictures whose nearly black pixels are black, means over the seeds of theirs. One line more
asks for the *same picture*: `dpm++`, as near to where the differential equation ends as `ddim` is after
1,000 steps from the same noise (root mean square, within 10%), against `DDPMPipeline`.

These rows are in nbs/logs/NAME/few_steps.jsonl, from `python tools/few_steps.py NAME rms fid whole`.
Each walk is timed whole, from noise to pictures on the CPU, by turns; of `DDPMPipeline`'s 1,000 steps
100, times ten. Medians over the rounds. A line is added to nbs/logs/quality.jsonl. Nothing else should
run beside it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

import torch

from ddpm_nb.runs import load_denoiser, shipped
from ddpm_nb.sample import sample

from .measure import machine, seconds
from .sides import installed

LOGS = Path(__file__).parents[1] / "nbs" / "logs"
WITHIN = 1.1
SHARE = 10  # of DDPMPipeline's walk a tenth is timed
DDPM, DDIM = ("ancestral", "uniform", 1000), ("ddim", "uniform", 50)


def way_of(row):
    return row["method"], row["spacing"], row["steps"]


def by_seed(rows):
    "{way: {seed: its row of FIDs}}."
    out = defaultdict(dict)
    for r in rows:
        if r["what"] == "fid":
            out[way_of(r)][r["seed"]] = r
    return out


def as_good(rows, reference):
    "The way with the fewest evaluations that is as good as the reference, and both means; or None."
    ways = by_seed(rows)
    if reference not in ways:
        return None
    seeds, fits = sorted(ways[reference]), []
    for way, own in ways.items():
        if not set(seeds) <= own.keys():
            continue  # one seed may be lucky
        mean = lambda of, k: statistics.mean(ways[of][s][k] for s in seeds)  # noqa: E731
        pairs = {k: (mean(way, k), mean(reference, k)) for k in ("fid", "snapped")}
        if all(ours <= WITHIN * theirs for ours, theirs in pairs.values()):
            fits.append((own[seeds[0]]["evaluations"], pairs["fid"][0], way, pairs))
    cost, _, way, pairs = min(fits)  # the reference itself fits
    return dict(way=way, evaluations=cost, seeds=len(seeds), **pairs)


def as_near(rows):
    "The same, for the same picture; or None."
    near = {way_of(r): r for r in rows if r["what"] == "rms"}
    whole = near.get(("ddim", "uniform", 1000))
    fits = [r for r in near.values() if whole and r["rms"] <= WITHIN * whole["rms"]]
    fits = [r for r in fits if r["method"] == "dpm++"]
    if not fits:
        return None
    best = min(fits, key=lambda r: (r["evaluations"], r["rms"]))
    pair = (best["rms"], whole["rms"])
    return dict(way=way_of(best), evaluations=best["evaluations"], rms=pair)


def questions(rows):
    "{what is asked: (the pipeline, its steps, our answer)}, of those that the rows can answer."
    asked = dict(
        ddim=("DDIMPipeline", 50, as_good(rows, DDIM)),
        ddpm=("DDPMPipeline", 1000, as_good(rows, DDPM)),
        picture=("DDPMPipeline", 1000, as_near(rows)),
    )
    return {k: v for k, v in asked.items() if v[2]}


def pipelines(name):
    "diffusers' two pipelines with these weights, as from_pretrained opens them."
    import diffusers

    from ddpm_nb.interop import export_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(name, Path(folder) / name)
        kinds = (diffusers.DDPMPipeline, diffusers.DDIMPipeline)
        out = {k.__name__: k.from_pretrained(str(Path(folder) / name)) for k in kinds}
    for pipeline in out.values():
        pipeline.set_progress_bar_config(disable=True)
    return out


def timed(args, asked):
    "Median seconds of every walk that is asked about; by turns."
    denoiser, theirs, walks = load_denoiser(args.name), pipelines(args.name), {}
    for pipeline, steps, answer in asked.values():
        method, spacing, own_steps = answer["way"]
        how = dict(method=method, spacing=spacing, steps=own_steps, batch_size=args.n)
        walks[answer["way"]] = lambda how=how: sample(denoiser, args.n, **how)
        walks[pipeline] = lambda p=theirs[pipeline], steps=steps: p(
            batch_size=args.n, num_inference_steps=steps // SHARE if steps == 1000 else steps
        )
    sample(denoiser, args.n, steps=1)  # warm
    times = defaultdict(list)
    for _ in range(args.rounds):
        for name, walk in walks.items():
            times[name].append(seconds(walk, "cpu"))
    share = dict(DDPMPipeline=SHARE)
    return {k: share.get(k, 1) * statistics.median(v) for k, v in times.items()}


def measure(args):
    "A line of the log."
    rows = [json.loads(line) for line in open(args.rows, encoding="utf-8")]
    asked = questions(rows)
    if not asked:
        sys.exit(f"{args.rows} has no walk to compare with: tools/few_steps.py {args.name} whole")
    took = timed(args, asked)
    answers = {
        what: dict(
            pipeline=pipeline,
            steps=steps,
            seconds=took[pipeline],
            ours=dict(answer, seconds=took[answer["way"]]),
            ratio=took[pipeline] / took[answer["way"]],
        )
        for what, (pipeline, steps, answer) in asked.items()
    }
    return dict(**machine("cpu"), name=args.name, pictures=args.n, rounds=args.rounds, **answers)


def table(result):
    "The numbers as lines to read."
    out = [
        f"{result['name']}, {result['pictures']} pictures; "
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}"
    ]
    for what in ("ddim", "ddpm", "picture"):
        if what not in result:
            out.append(f"{what}: the rows do not say")
            continue
        r = result[what]
        method, spacing, steps = r["ours"]["way"]
        pairs = {k: r["ours"][k] for k in ("fid", "snapped", "rms") if k in r["ours"]}
        worth = ", ".join(f"{k} {a:.2f} for {b:.2f}" for k, (a, b) in pairs.items())
        seeds = f" ({r['ours']['seeds']} seeds)" if "seeds" in r["ours"] else ""
        out.append(
            f"{r['pipeline']} in {r['steps']:,} steps {r['seconds']:.1f} s; {method} {spacing} in "
            f"{steps} {r['ours']['seconds']:.2f} s: {r['ratio']:.1f} times; {worth}{seeds}"
        )
    return "\n".join(out)


def main(argv=None):
    p = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__.split("\n")[0])
    p.add_argument("name", choices=shipped())
    p.add_argument("--n", type=int, default=64, help="pictures")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, help="CPU threads; left out: torch's choice")
    p.add_argument("--rows", type=Path, help="nbs/logs/NAME/few_steps.jsonl")
    p.add_argument("--log", type=Path, default=LOGS / "quality.jsonl")
    args = p.parse_args(argv)
    args.rows = args.rows or LOGS / args.name / "few_steps.jsonl"
    if not installed("diffusers"):
        sys.exit("benchmarks.quality needs diffusers: pip install 'ddpm_nb[interop]'")
    warnings.filterwarnings("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(args)
    print(table(result))
    with open(args.log, "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
