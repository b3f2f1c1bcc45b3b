"""Where a training step's time goes, beside what the machine would allow.

    python -m benchmarks.speed                                     # widths 64,128,128, batch 16
    python -m benchmarks.speed --preset cifar10 --batch 128 --device cuda
    python -m benchmarks.speed --preset cifar10 --count            # operations and bytes alone

First the machine's rates: floating-point operations a second in a matrix product, bytes a second in a
copy. Then a training step (`Trainer.step`) and an answer of the network, which is what a sampler asks
for (it never compiles it), in several ways that take turns: in both layouts of memory, in each precision, eager and compiled (--compile). For the first way
a step's time is told apart by kind of operation (torch's profiler, on one thread unless --threads says
otherwise), beside what the roofline allows for that kind: its operations at the rate of a matrix
product, or its bytes at the rate of a copy, whichever takes longer. Operations and bytes are counted on the meta device, where each operation reads its inputs
and writes its outputs once. A line is added to nbs/logs/speed.jsonl. Nothing else should run beside it.
"""

import argparse
import json
import os
import statistics
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ddpm_nb.data import PictureData
from ddpm_nb.device import autocast
from ddpm_nb.objective import Denoiser, training_loss
from ddpm_nb.scheduler import LinearNoiseScheduler
from ddpm_nb.train import DiffusionConfig, Trainer
from ddpm_nb.unet import ModelConfig, UNet

from .measure import copy_rate, machine, matmul_rate, seconds

LOG = Path(__file__).parents[1] / "nbs" / "logs" / "speed.jsonl"
KINDS = (  # the first whose word is in an operation's name
    ("optimiser, clipping, average", ("adam", "lerp", "vector_norm", "foreach")),
    ("convolution, backward", ("convolution_backward",)),
    ("convolution", ("convolution", "conv2d")),
    ("GroupNorm, backward", ("group_norm_backward",)),
    ("GroupNorm", ("group_norm",)),
    ("SiLU, backward", ("silu_backward",)),
    ("SiLU", ("silu",)),
    ("attention", ("scaled_dot", "flash", "bmm", "softmax")),
    ("linear layers", ("addmm", "aten.mm", "aten::mm", "linear")),
    ("copies", ("copy", "clone", "contiguous")),
    ("sums, joins, resizing", ("add", "cat", "upsample", "pad", "mul", "sum", "slice_backward")),
)


def kind_of(name):
    "What an operation is told under."
    return next((kind for kind, words in KINDS if any(w in name for w in words)), "the rest")


class Account(TorchDispatchMode):
    "Counts operations and bytes by kind, and by the size of the pictures that they are about."

    def __init__(self, config, batch):
        super().__init__()
        self.batch, levels = batch, len(config.dim_multiply)
        self.sizes = [config.lowest_resolution_size * 2**k for k in range(levels)]
        self.by_kind, self.by_size = defaultdict(lambda: [0, 0]), defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        touched = [x for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)]
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        size = max(map(self.size, touched), default=0)
        for found in (self.by_kind[kind_of(str(func))], self.by_size[size]):
            found[0] += flops
            found[1] += sum(x.nbytes for x in touched)
        return out

    def size(self, x):
        "Of which pictures a tensor is: one that was padded counts as they do. 0: of none."
        if x.ndim < 3 or x.shape[0] != self.batch:
            return 0
        *_, h, w = x.shape
        if x.ndim == 4 and h == w and (h in self.sizes or h - 1 in self.sizes):
            return h if h in self.sizes else h - 1
        pixels = {s * s: s for s in self.sizes}  # in attention, a pixel a row
        return pixels.get(h, 0)


def account(config, batch):
    "What a loss and its gradient ask for, in float32."
    with torch.device("meta"):
        net = UNet(config)
        x, t = torch.empty(batch, *config.picture_shape), torch.ones(batch, dtype=torch.int64)
    denoiser = Denoiser(net, LinearNoiseScheduler(1000))
    training_loss(denoiser, x, t, x).mean().backward()  # the tables are copied
    with Account(config, batch) as found:
        training_loss(denoiser, x, t, x).mean().backward()
    return found


def new_trainer(args, config, precision, compiled):
    c = DiffusionConfig(
        batch_size=args.batch, precision=precision, compile="on" if compiled else "off"
    )
    data = PictureData(torch.zeros(args.batch, *config.picture_shape, dtype=torch.uint8))
    return Trainer(c.new_denoiser(config).to(args.device), data, c)


def clock(args, ways, trainers):
    "Into each way: median seconds of a training step and of an answer, by turns; those of the first."
    times = {(k, what): [] for k in range(len(ways)) for what in ("seconds", "answer")}
    for round_ in range(-1, args.rounds):  # the first one compiles and warms up
        for k, (way, trainer) in enumerate(zip(ways, trainers, strict=True)):
            batch = trainer.batch(1, trainer.data.pictures)
            step = partial(trainer.step, 1, batch)
            if round_ < 0:
                way["first"] = seconds(step, args.device)
            took = dict(seconds=seconds(step, args.device))
            trainer.denoiser.net.eval()
            took["answer"] = seconds(partial(answer, trainer, batch, way), args.device)
            trainer.denoiser.net.train()
            for what, value in took.items():
                if round_ >= 0:
                    times[k, what].append(value)
    for (k, what), values in times.items():
        ways[k][what] = statistics.median(values)


@torch.no_grad()
def answer(trainer, batch, way):
    "The network's, without a gradient."
    with autocast(trainer.device, way["precision"]):
        trainer.denoiser.net(batch.x0, batch.t)


def profiled(args, trainer):
    "Seconds a step by kind of operation."
    batch, times = trainer.batch(1, trainer.data.pictures), defaultdict(float)
    trainer.step(1, batch)
    there = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (args.device == "cuda")]
    with profile(activities=there) as p:
        for _ in range(args.rounds):
            trainer.step(1, batch)
    for event in p.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a GPU's kernel, whose time its operation has as well
        took = event.self_device_time_total if args.device == "cuda" else event.self_cpu_time_total
        times[kind_of(event.key.lower())] += took / 1e6 / args.rounds
    return dict(times)


def measure(args):
    "A line of the log."
    config = network(args)
    ways = [
        dict(precision=precision, layout=layout, compiled=compiled)
        for precision in args.precision
        for layout, compiled in [
            ("channels_last", False),
            ("contiguous", False),
            *[("channels_last", True)] * args.compile,
        ]
    ]
    layout = dict(channels_last=torch.channels_last, contiguous=torch.contiguous_format)
    trainers = [new_trainer(args, config, way["precision"], way["compiled"]) for way in ways]
    for way, trainer in zip(ways, trainers, strict=True):
        for net in (trainer.model, trainer.ema.model):
            net.to(memory_format=layout[way["layout"]])
    clock(args, ways, trainers)
    for way in ways:
        print(f"{way['precision']}, {way['layout']}, {'compiled' if way['compiled'] else 'eager'}: "
              f"{args.batch / way['seconds']:.1f} pictures/s, "
              f"{args.batch / way['answer']:.1f} answers/s", flush=True)  # fmt: skip
    by_kind = profiled(args, trainers[0])
    asked = account(config, args.batch)
    return dict(
        **machine(args.device),
        network=config.to_dict(),
        batch=args.batch,
        matmul={p: matmul_rate(p, args.device) for p in ("float32", "bf16")},
        copies=copy_rate(args.device),
        ways=ways,
        seconds_by_kind=by_kind,
        asked_by_kind=dict(asked.by_kind),
        asked_by_size=dict(asked.by_size),
    )


def table(result):
    "By kind: seconds, share, what the roofline allows."
    spent, asked = result["seconds_by_kind"], result["asked_by_kind"]
    rates, copies = result["matmul"], result["copies"]
    rate = rates.get(result["ways"][0]["precision"], rates["float32"])
    total = sum(spent.values())
    out = [f"{result['device']}, {result['threads']} threads, {result['ways'][0]['precision']}"]
    out.append(f"{'':30} {'ms':>8} {'share':>6} {'limit, ms':>10}")
    for kind, took in sorted(spent.items(), key=lambda item: -item[1]):
        flops, moved = asked.get(kind, (0, 0))
        limit = max(flops / rate, moved / copies)
        out.append(f"{kind:30} {1e3 * took:8.1f} {took / total:6.1%} {1e3 * limit:10.1f}")
    return "\n".join(out)


def network(args):
    if args.preset:
        return ModelConfig.preset(args.preset)
    return ModelConfig(8, (1, 2, 2), (1,), 64)  # side_by_side's: 64, 128, 128, attention at 16


def parse(argv):
    p = argparse.ArgumentParser("python -m benchmarks.speed", description=__doc__.splitlines()[0])
    p.add_argument("--preset", help="a network by name; left out: widths 64,128,128")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--precision", type=lambda s: s.split(","), default=["float32"])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action="store_true", help="also compiled")
    p.add_argument("--count", action="store_true", help="count only, and time nothing")
    p.add_argument("--log", type=Path, default=LOG)
    return p.parse_args(argv)


def main(argv=None):
    "Measures, prints, logs."
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.count:
        asked = account(network(args), args.batch)
        result = dict(network=network(args).to_dict(), batch=args.batch, torch=torch.__version__)
        result |= dict(asked_by_kind=dict(asked.by_kind), asked_by_size=dict(asked.by_size))
        with open(args.log, "a", encoding="utf-8") as f:
            return print(json.dumps(result), file=f)
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"  # where there is a GPU, Trainer would take it
    result = measure(args)
    with open(args.log, "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
