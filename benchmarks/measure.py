"What a machine can do, and what a network asks of it."

import contextlib
import platform
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_nb.device import float32_products
from ddpm_nb.unet import UNet


def wait(device):
    "Until the device has done what it was told."
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(step, device, repeats=1):
    "Seconds a call takes."
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait(device)
    return (time.perf_counter() - start) / repeats


def best_of(step, device, tries=10, limit=2.0):
    "The shortest of ten calls, or of those that two seconds allow."
    times = []
    while len(times) < tries and sum(times) < limit:
        times.append(seconds(step, device))
    return min(times)


def matmul_rate(precision, device):
    "Floating-point operations a second in a matrix product: float32, tf32 or bf16."
    n = 8192 if torch.device(device).type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    with float32_products(device, precision):
        return 2 * n**3 / best_of(lambda: a @ b, device)


def copy_rate(device, megabytes=64):
    "Bytes a second that are read and written when a tensor larger than the caches is copied."
    a = torch.ones(megabytes * 250_000, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / best_of(lambda: b.copy_(a), device)


def device_name(device):
    "The processor's name."
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def machine(device):
    "What a row says of where it was measured."
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return dict(
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__.partition("+")[0],
        **dict(amx=amx) if torch.device(device).type == "cpu" else {},
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


def forget_peak(device):
    "From here on a new peak is counted."
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux has it: VmHWM starts anew
            Path("/proc/self/clear_refs").write_text("5")


def peak(device):
    "Bytes: what torch holds on a GPU at most, or this process."
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def operations(config):
    "Floating-point operations of a network's answer to one picture, and those of them in attention."
    with torch.device("meta"):
        net = UNet(config)
        x, t = torch.empty(1, *config.picture_shape), torch.ones(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, t)
    by_kind = counter.get_flop_counts()["Global"]
    attention = sum(
        n for kind, n in by_kind.items() if "attention" in str(kind) or "bmm" in str(kind)
    )
    return counter.get_total_flops(), attention
