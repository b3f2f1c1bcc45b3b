"""How long until 64 pictures of full quality are there? Ours and diffusers, with the same weights.

    python -m benchmarks.quality digits
    python -m benchmarks.quality fashion_mnist

diffusers as its users run it: `DDPMPipeline` in 1,000 steps, and `DDIMPipeline` in 50. Ours: `sample`, in
the fewest steps that are as good, by any sampler. What a walk of theirs is worth is what the same walk
is worth here, `ancestral` in 1,000 steps and `ddim` in 50, evenly spaced from T as the exported
scheduler says. As good is: at most 10% worse in FID, and in the FID of pictures whose nearly black
pixels are black; means over all seeds of the reference, the difference with its standard error (none
with one seed: then it is a hint). The way is chosen among all that were measured, on those seeds. A
last line asks for the *same picture*: `dpm++`, at most 10% further from where the differential equation
ends than `ddim` is after 1,000 steps from the same noise (root mean square), against `DDIMPipeline` in
as many.

Most of such a ratio is the sampler's, and diffusers has it too, for those who put it into the pipeline:
`DPMSolverMultistepScheduler`, in as many steps as ours, evenly spaced, is timed beside it; what its
pictures are worth is not judged. What is left of the ratio is the library's.

The rows are in nbs/logs/NAME, from `python tools/few_steps.py NAME rms fid whole`. Each walk is timed
from noise to an array on the CPU, by turns; of 1,000 steps 100, times ten. Medians over the rounds. A
line is added to nbs/logs/quality.jsonl. Nothing else should run beside it.
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
SHARE = 10  # of a walk of 1,000 steps a tenth is timed
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


def compared(own, other, k):
    "Both means over the seeds of the other, and the standard error of their difference."
    pairs = [(own[s][k], other[s][k]) for s in other]
    off = [a - b for a, b in pairs]
    error = statistics.stdev(off) / len(off) ** 0.5 if len(off) > 1 and own is not other else 0.0
    return *(statistics.mean(side) for side in zip(*pairs, strict=True)), error


def as_good(rows, reference):
    "The way with the fewest evaluations that is as good as the reference, and both means; or None."
    ways = by_seed(rows)
    if reference not in ways:
        return None
    seeds, fits = sorted(ways[reference]), []
    for way, own in ways.items():
        if not set(seeds) <= own.keys():
            continue  # one seed may be lucky
        pairs = {k: compared(own, ways[reference], k) for k in ("fid", "snapped")}
        if all(ours + error <= WITHIN * theirs for ours, theirs, error in pairs.values()):
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
        picture=("DDIMPipeline", 1000, as_near(rows)),
    )
    return {k: v for k, v in asked.items() if v[2]}


SOLVERS = {"dpm++": "dpmsolver++", "sde-dpm++": "sde-dpmsolver++"}  # their names


def pipelines(name):
    "{name: a pipeline of diffusers with these weights}: its own two, as from_pretrained opens them."
    import diffusers

    from ddpm_nb.interop import export_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        classes = load_denoiser(name).net.config.num_classes  # its last row: no label
        export_checkpoint(name, Path(folder) / name, label=classes)
        kinds = (diffusers.DDPMPipeline, diffusers.DDIMPipeline)
        out = {k.__name__: k.from_pretrained(str(Path(folder) / name)) for k in kinds}
    for pipeline in out.values():
        pipeline.set_progress_bar_config(disable=True)
    return out


def with_solver(pipeline, way):
    "The same with diffusers' solver of our way, its steps evenly spaced."
    import diffusers

    # evenly: where Karras's first levels round to one t, its walk stops with an error
    config = dict(pipeline.scheduler.config, algorithm_type=SOLVERS[way[0]])
    solver = diffusers.DPMSolverMultistepScheduler.from_config(config)
    return diffusers.DDPMPipeline(pipeline.unet, solver)


def timed(args, asked):
    "Median seconds of every walk that is asked about, by turns: (who, steps) -> seconds."
    denoiser, theirs, walks = load_denoiser(args.name), pipelines(args.name), {}

    def drawn_by(pipeline, steps):
        pipeline.set_progress_bar_config(disable=True)
        share = steps // SHARE if steps == 1000 else steps
        return lambda: pipeline(batch_size=args.n, num_inference_steps=share, output_type="np")

    for name, steps, answer in asked.values():
        way = method, spacing, own_steps = answer["way"]
        how = dict(method=method, spacing=spacing, steps=own_steps, batch_size=args.n)
        walks[way] = lambda how=how: sample(denoiser, args.n, **how)
        walks[name, steps] = drawn_by(theirs[name], steps)
        if method in SOLVERS:
            solver = with_solver(theirs["DDPMPipeline"], way)
            walks["solver", *way] = drawn_by(solver, own_steps)
    for pipeline in theirs.values():
        pipeline(batch_size=1, num_inference_steps=1, output_type="np")  # warm
    sample(denoiser, 1, steps=1)
    times = defaultdict(list)
    for _ in range(args.rounds):
        for name, walk in walks.items():
            times[name].append(seconds(walk, "cpu"))
    return {k: statistics.median(v) * (SHARE if k[1:] == (1000,) else 1) for k, v in times.items()}


def measure(args):
    "A line of the log."
    files = [f for f in (args.rows / f"{k}.jsonl" for k in ("few_steps", "whole")) if f.is_file()]
    rows = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    asked = questions(rows)
    if not asked:
        sys.exit(f"{args.rows} has no walk to compare with: tools/few_steps.py {args.name} whole")
    took = timed(args, asked)
    answers = {
        what: dict(
            pipeline=pipeline,
            steps=steps,
            seconds=took[pipeline, steps],
            ours=dict(answer, seconds=took[answer["way"]]),
            ratio=took[pipeline, steps] / took[answer["way"]],
            solver_seconds=took.get(("solver", *answer["way"])),
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
        worth = ", ".join(f"{k} {p[0]:.2f} for {p[1]:.2f}" for k, p in pairs.items())
        seeds = f" ({r['ours']['seeds']} seeds)" if "seeds" in r["ours"] else ""
        out.append(
            f"{r['pipeline']} in {r['steps']:,} steps {r['seconds']:.1f} s; {method} {spacing} in "
            f"{steps} {r['ours']['seconds']:.2f} s: {r['ratio']:.1f} times; {worth}{seeds}"
        )
        if r["solver_seconds"]:
            out.append(
                f"  with DPMSolverMultistepScheduler in {steps}: {r['solver_seconds']:.2f} s"
            )
    return "\n".join(out)


def main(argv=None):
    p = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__.split("\n")[0])
    p.add_argument("name", choices=shipped())
    p.add_argument("--n", type=int, default=64, help="pictures")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, help="CPU threads; left out: torch's choice")
    p.add_argument("--rows", type=Path, help="a folder; left out: nbs/logs/NAME")
    p.add_argument("--log", type=Path, default=LOGS / "quality.jsonl")
    args = p.parse_args(argv)
    args.rows = args.rows or LOGS / args.name
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
