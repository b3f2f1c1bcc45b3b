"""Put a run's EMA weights into the package, with everything that says where they come from.

    python tools/ship.py runs/plain fashion_mnist_plain --commit 0123abc --device "one H100"
    python tools/ship.py runs/digits/step-0000400 digits_early --bare --commit ... --device ...

Writes ddpm_nb/weights/NAME/ (the weights in half precision, config.json, the table of errors, the
run card with the rows of its evaluation) and nbs/logs/NAME/log.jsonl (the run's log); nothing, if
something is missing. With --bare without table and evaluation: for an early self of another
network, which only guides that one, or one that is still to be measured. The card says how far the samples of the half precision weights are from those of the
originals. `make ship` measures, ships, and makes the README and page 15 anew.
"""

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from ddpm_nb import __version__
from ddpm_nb.runs import WEIGHTS, find_checkpoint, load_denoiser, read_checkpoint
from ddpm_nb.sample import sample

ROOT = Path(__file__).parent.parent
STEPS, PICTURES = 50, 16  # of the comparison between both precisions


def half_precision(denoiser):
    "The weights as float16, and what that changes in the samples, in grey levels of 255."
    how = dict(steps=STEPS, method="ddim", spacing="uniform", batch_size=PICTURES)
    before = sample(denoiser, PICTURES, **how)
    weights = {k: v.half().contiguous() for k, v in denoiser.net.state_dict().items()}
    denoiser.net.load_state_dict(weights)
    after = sample(denoiser, PICTURES, **how)
    off = (after - before).abs() * 127.5
    return weights, dict(
        pictures=PICTURES,
        steps=STEPS,
        mean_difference_of_255=round(float(off.mean()), 4),
        largest_difference_of_255=round(float(off.max()), 2),
        share_of_pixels_within_1=round(float((off <= 1).double().mean()), 4),
    )


def wall_time(log, batch):
    "Seconds of training, from the speeds in the log."
    steps = [0, *(x["step"] for x in log)]
    return round(
        sum(
            (b - a) * batch / x["pictures_per_second"]
            for a, b, x in zip(steps, steps[1:], log, strict=False)
        )
    )


def collect(run, name, commit, device, bare=False):
    "Everything that will be written: file -> content."
    step = find_checkpoint(run)
    log = step.parent / "log.jsonl"
    needed = step / "evaluation.json", step / "x0_error.safetensors"
    for file in needed if not bare else ():
        if not file.is_file():
            sys.exit(
                f"{file} is not there: measure the run first (tools/table.py or ddpm-evaluate)"
            )
    rows = [] if bare else json.loads(needed[0].read_text())
    if not bare and {r["settings"]["what"] for r in rows} != {"bits", "quality"}:
        sys.exit(f"{needed[0]}: expected rows of bits and of quality")
    config, _ = read_checkpoint(step, "model")
    weights, half = half_precision(load_denoiser(step))
    content = save(weights)
    if len(content) > 12e6:
        sys.exit(
            f"the weights take {len(content) / 1e6:.1f} MB, more than a package should hold (12)"
        )
    digest = hashlib.sha256(content).hexdigest()
    config["sha256"] = {"model.safetensors": digest}
    config["training"]["out_dir"] = None
    batch = config["training"]["batch_size"]
    lines = [json.loads(x) for x in log.read_text().splitlines()]
    lines = [x for x in lines if x["step"] <= config["step"]]
    versions = dict(ddpm_nb=__version__, torch=torch.__version__, python=platform.python_version())
    card = dict(
        name=name,
        parameters=sum(v.numel() for v in weights.values()),
        bytes=len(content),
        sha256=digest,
        commit=commit,
        device=device,
        versions=versions,
        steps=config["step"],
        pictures_seen=config["step"] * batch,
        wall_seconds=wall_time(lines, batch),
        last_loss=lines[-1]["loss"],
        half_precision=half,
        prediction=config.get("prediction", "noise"),
        **{k: config[k] for k in ("model", "scheduler", "training", "data")},
        evaluation=rows,
    )
    target, logs = WEIGHTS / name, ROOT / "nbs" / "logs" / name
    files = {
        target / "model.safetensors": content,
        target / "config.json": text(config),
        target / "run_card.json": text(card),
        logs / "log.jsonl": "".join(json.dumps(x) + "\n" for x in lines).encode(),
    }
    if not bare:
        files[target / "x0_error.safetensors"] = needed[1].read_bytes()
    return files, card


def text(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def main():
    p = argparse.ArgumentParser("tools/ship.py", description=__doc__.splitlines()[0])
    p.add_argument("run", help="a run folder, or one step-... folder in it")
    p.add_argument("name", help="what `load_denoiser` will call it")
    p.add_argument("--commit", required=True, help="of the code that the run was made with")
    p.add_argument("--device", required=True, help="that the run was made on, in words")
    p.add_argument("--bare", action="store_true", help="without table and evaluation")
    a = p.parse_args()
    files, card = collect(a.run, a.name, a.commit, a.device, a.bare)
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    print(
        f"{a.name}: {card['bytes'] / 1e6:.2f} MB, {card['parameters']} parameters, "
        f"half precision: {card['half_precision']}"
    )


if __name__ == "__main__":
    main()
