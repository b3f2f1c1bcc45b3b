"""Put a run's EMA weights into the package, with everything that says where they come from.

    ddpm-train fashion_mnist --out-dir runs/fashion_mnist        # hours; or resume it
    ddpm-evaluate runs/fashion_mnist                             # and other rows, as many as wanted
    python tools/ship.py runs/fashion_mnist fashion_mnist

Writes ddpm_nb/weights/NAME/ (the weights in half precision, config.json, the table of errors, the
run card) and nbs/logs/NAME/ (the run's log, the rows of its evaluation). The card says how far the
samples of the half precision weights are from those of the originals. Rows that were measured are
kept: call it again after another ddpm-evaluate. The pages and the README read these files.
"""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors.torch import save_file

from ddpm_nb import __version__
from ddpm_nb.sample import WEIGHTS, find_checkpoint, load_checkpoint, read_checkpoint, sample

ROOT = Path(__file__).parent.parent
STEPS, PICTURES = 50, 16  # of the comparison between both precisions


def half_precision(model, scheduler):
    "The weights as float16, and what that changes in the samples, in grey levels of 255."
    before = sample(model, scheduler, PICTURES, steps=STEPS, method="ddim", batch_size=PICTURES)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict(weights)
    after = sample(model, scheduler, PICTURES, steps=STEPS, method="ddim", batch_size=PICTURES)
    off = (after - before).abs() * 127.5
    return weights, dict(
        pictures=PICTURES,
        steps=STEPS,
        mean_difference_of_255=round(float(off.mean()), 4),
        largest_difference_of_255=round(float(off.max()), 2),
        share_of_pixels_within_1=round(float((off <= 1).double().mean()), 4),
    )


def wall_time(log):
    "Seconds of training, from the speeds in the log."
    seconds, last = 0.0, 0
    for line in log:
        seconds += (line["step"] - last) * line["batch"] / line["pictures_per_second"]
        last = line["step"]
    return round(seconds)


def main():
    p = argparse.ArgumentParser("tools/ship.py", description=__doc__.splitlines()[0])
    p.add_argument("run", help="a run folder, or one step-... folder in it")
    p.add_argument("name", help="what `load_pretrained` will call it")
    p.add_argument("--commit", help="that the run was made with; HEAD by default")
    p.add_argument("--device", default="cpu", help="that the run was made on, in words")
    a = p.parse_args()
    step = find_checkpoint(a.run)
    config, _ = read_checkpoint(step, "model")
    model, scheduler = load_checkpoint(step)
    target, logs = WEIGHTS / a.name, ROOT / "nbs" / "logs" / a.name
    for folder in (target, logs):
        folder.mkdir(parents=True, exist_ok=True)
    weights, half = half_precision(model, scheduler)
    save_file(weights, target / "model.safetensors")
    (target / "model.safetensors").chmod(0o644)
    digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    config["sha256"] = {"model.safetensors": digest}
    config["training"]["out_dir"] = None
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for file in ("x0_error.safetensors",):
        if (step / file).is_file():
            shutil.copyfile(step / file, target / file)
    lines = [json.loads(x) for x in (step.parent / "log.jsonl").read_text().splitlines()]
    lines = [x for x in lines if x["step"] <= config["step"]]
    (logs / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    rows = []
    if (step / "evaluation.json").is_file():
        rows = json.loads((step / "evaluation.json").read_text())
        (logs / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    batch = config["training"]["batch_size"]
    card = dict(
        name=a.name,
        parameters=sum(v.numel() for v in weights.values()),
        bytes=(target / "model.safetensors").stat().st_size,
        sha256=digest,
        commit=a.commit or head.stdout.strip(),
        device=a.device,
        versions=dict(
            ddpm_nb=__version__, torch=torch.__version__, python=platform.python_version()
        ),
        steps=config["step"],
        pictures_seen=config["step"] * batch,
        wall_seconds=wall_time([dict(x, batch=batch) for x in lines]),
        last_loss=lines[-1]["loss"],
        half_precision=half,
        **{k: config[k] for k in ("model", "scheduler", "training", "data")},
        evaluation=rows,
    )
    (target / "run_card.json").write_text(json.dumps(card, indent=1) + "\n")
    print(f"{target}: {card['bytes'] / 1e6:.2f} MB, {card['parameters']} parameters, half: {half}")


if __name__ == "__main__":
    main()
