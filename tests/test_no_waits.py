"""A step that never makes a GPU wait, proved without one.

A `FakeTensorMode` runs operations on a GPU that is not there: shapes and devices are worked out, values
are not. Whatever needs a value (`.item()`, a mask as an index) raises. What it would let pass is noted
here: tensors of two devices in one operation, and copies that are waited for. Autograd refuses a fake
GPU, so the step with its backward pass runs on the `meta` device, which has no values either."""

import contextlib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_nb.control import _repaint, _walk_up, _with_jumps, autoguided, guided
from ddpm_nb.data import PictureData
from ddpm_nb.device import ahead
from ddpm_nb.objective import PREDICTIONS, Denoiser, training_loss
from ddpm_nb.runs import StopSignal
from ddpm_nb.sample import SAMPLERS, _NoiseAhead, timestep_walk
from ddpm_nb.scheduler import CosineNoiseScheduler, stream
from ddpm_nb.train import EMA, Batch, DiffusionConfig, LossLog, Trainer, _Run, train_diffusion
from ddpm_nb.unet import ModelConfig, UNet

SMALL = ModelConfig(8, (1, 2), (1,), 8, channels=1, dropout=0.1)
SHAPE = 4, 1, 16, 16
WALK = timestep_walk(CosineNoiseScheduler(50), 6, "karras")
aten = torch.ops.aten


class Tiny(torch.nn.Module):
    "A network of one layer."

    def __init__(self, config):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x) + t.view(-1, 1, 1, 1)


class Waits(TorchDispatchMode):
    "Notes each operation for which a GPU would have to stop, or which it would refuse."

    def __init__(self, device):
        super().__init__()
        self.device, self.found = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = self.devices(args, kwargs)
        if func is aten._local_scalar_dense.default and self.device in devices:
            self.found.append("a number read back")
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            free = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            back = "cpu" in self.devices(out)
            if len(devices | self.devices(out)) > 1 and (back or not free):
                self.found.append("a copy that is waited for")
        elif len(devices) > 1:
            self.found.append(f"two devices in {func}")
        return out

    def devices(self, *trees):
        "Where the tensors are. One without dimensions on the CPU is a number: it goes with the order."
        tensors = [x for x in tree_leaves(trees) if torch.is_tensor(x)]
        numbers = [x.device.type == "cpu" and not x.ndim for x in tensors]
        return {x.device.type for x, number in zip(tensors, numbers, strict=True) if not number}


@contextlib.contextmanager
def no_waits(device):
    "Fails where a GPU would have waited."
    with Waits(device) as waits:
        yield
    assert not waits.found, waits.found


# ---- on a GPU that is not there: everything but the backward pass

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch knows no CUDA"
)


@pytest.fixture
def gpu():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake_denoiser(prediction="noise", zero=False, net=UNet, config=SMALL):
    scheduler = CosineNoiseScheduler(50, zero_terminal_snr=zero)
    with FakeTensorMode(), torch.device("cuda"):
        net = net(config).requires_grad_(False).eval()
    return Denoiser(net, scheduler, prediction)


def arrived():
    "A batch on its way in (a fake tensor cannot be pinned)."
    bytes, t = torch.zeros(SHAPE, dtype=torch.uint8), torch.ones(4, dtype=torch.int64)
    trainer = SimpleNamespace(device=torch.device("cuda"), data=SimpleNamespace(num_levels=256))
    return Trainer._sent(trainer, Batch(bytes, t, torch.zeros(SHAPE)))


def walked(denoiser, method, clip=True):
    "Six steps of a walk."
    noise = lambda x=None: torch.zeros(SHAPE).to("cuda", non_blocking=True)  # noqa: E731
    with torch.no_grad(), no_waits("cuda"):
        return SAMPLERS[method](denoiser, denoiser.scheduler, noise(), WALK, noise, clip=clip)


@needs_cuda_build
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_waits_for_nothing(prediction, gamma, request):
    denoiser = fake_denoiser(prediction)
    request.getfixturevalue("gpu")
    log, loss = LossLog(50, "cuda"), lambda b: training_loss(denoiser, *b, min_snr_gamma=gamma)
    loss(arrived())  # the schedule's tables are copied once
    with no_waits("cuda"):
        batch = arrived()
        log.add(batch.t, loss(batch))


@needs_cuda_build
def test_optimiser_clipping_and_average_wait_for_nothing():
    net = fake_denoiser(net=Tiny).net
    with FakeTensorMode(allow_non_fake_inputs=True):
        ema, parameters = EMA(net), list(net.parameters())
        for p in parameters:
            p.grad = torch.zeros_like(p)
        adam = torch.optim.Adam(parameters, fused=False)
        adam.step()  # its moments are made
        with no_waits("cuda"):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.param_groups[0]["lr"] = 0.1
            adam.step()
            ema.update(1)


@needs_cuda_build
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction, zero", [("noise", False), ("x0", True), ("v", True)])
@pytest.mark.parametrize("method", SAMPLERS)
def test_a_walk_waits_for_nothing(method, prediction, zero, clip, request):
    denoiser = fake_denoiser(prediction, zero, Tiny)
    request.getfixturevalue("gpu")
    x0 = walked(denoiser, method, clip)
    assert x0.device.type == "cuda" and x0.shape == SHAPE


@needs_cuda_build
def test_a_walk_with_a_real_network_waits_for_nothing(request):
    denoiser = fake_denoiser()
    request.getfixturevalue("gpu")
    walked(denoiser, "sde-dpm++")


@needs_cuda_build
def test_a_walk_with_labels_waits_for_nothing(request):
    denoiser = fake_denoiser(config=replace(SMALL, num_classes=3))
    request.getfixturevalue("gpu")
    labels = torch.zeros(4, dtype=torch.int64).to("cuda")
    ask = partial(denoiser, labels=labels)
    ask.scheduler = denoiser.scheduler
    walked(ask, "sde-dpm++")


@needs_cuda_build
@pytest.mark.parametrize("interval", [None, (20, 50)])
def test_guidance_waits_for_nothing(request, interval):
    denoiser = fake_denoiser(config=replace(SMALL, num_classes=3))
    both = guided(denoiser, 2.0, interval), autoguided(denoiser, denoiser, 2.0, interval)
    request.getfixturevalue("gpu")
    labels = torch.zeros(4, dtype=torch.int64).to("cuda")
    for strong in both:
        ask = partial(strong, labels=labels)
        ask.scheduler = denoiser.scheduler
        walked(ask, "sde-dpm++")


@needs_cuda_build
def test_a_hole_and_the_way_up_wait_for_nothing(request):
    denoiser = fake_denoiser()
    request.getfixturevalue("gpu")
    noise = lambda x=None: torch.zeros(SHAPE).to("cuda", non_blocking=True)  # noqa: E731
    known, mask = noise(), noise()
    with torch.no_grad(), no_waits("cuda"):
        way = _with_jumps(WALK, 2, 2)
        x = _repaint(denoiser, denoiser.scheduler, noise(), way, noise, known, mask)
        assert _walk_up(denoiser, denoiser.scheduler, x, WALK).device.type == "cuda"


class ReadsBack(Tiny):
    def forward(self, x, t):
        return super().forward(x, t) * t.float().mean().item()


class LooksUpOnTheCPU(Tiny):
    def forward(self, x, t):
        table = torch.ones(51)
        return super().forward(x, t) * table[t].to(x.device, non_blocking=True).view(-1, 1, 1, 1)


class CopiesAndWaits(Tiny):
    def forward(self, x, t):
        return super().forward(x, t) * torch.ones(1, 1, 1, 1).to(x.device)


class CopiesBack(Tiny):
    def forward(self, x, t):
        x.to("cpu", non_blocking=True)
        return super().forward(x, t)


MISTAKES = [
    (ReadsBack, "item|data-dependent|_local_scalar_dense"),
    (LooksUpOnTheCPU, "two devices in aten.index"),
    (CopiesAndWaits, "a copy that is waited for"),
    (CopiesBack, "a copy that is waited for|Cannot copy out of meta"),
]


@needs_cuda_build
@pytest.mark.parametrize("net, said", MISTAKES)
def test_a_planted_wait_is_found_in_a_walk(net, said, request):
    denoiser = fake_denoiser(net=net)
    request.getfixturevalue("gpu")
    with pytest.raises(Exception, match=said):
        walked(denoiser, "ddim")


# ---- without a device at all: the whole step


def meta_trainer(net=UNet, classes=None, **fields):
    config = DiffusionConfig(batch_size=4, timesteps_diff=50, precision="float32", **fields)
    labels = None if classes is None else torch.zeros(4, dtype=torch.int64)
    names = tuple("abc"[:classes])
    data = PictureData(torch.zeros(SHAPE, dtype=torch.uint8), labels=labels, class_names=names)
    with torch.device("meta"):
        weights = net(replace(SMALL, num_classes=classes))
    denoiser = Denoiser(weights, config.scheduler(), config.prediction)
    adam = torch.optim.Adam(denoiser.net.parameters(), fused=False)
    accelerator = Accelerator(device_placement=False, cpu=True)
    return Trainer(denoiser, data, config, accelerator, adam)


def two_steps(trainer):
    "The first makes Adam's moments and copies the schedule's tables; the second is looked at."
    for step in (1, 2):
        batch = trainer.batch(step, trainer.data.pictures, trainer.data.labels)
        with no_waits("meta") if step == 2 else contextlib.nullcontext():
            norm = trainer.step(step, batch)
    return norm


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(classes=3),
        dict(prediction="v", min_snr_gamma=5.0, grad_accumulation=2),
        dict(prediction="x0", zero_terminal_snr=True, use_augmentation=True, checkpointing=True),
    ],
)
def test_a_training_step_waits_for_nothing(fields):
    trainer = meta_trainer(**fields)
    norm = two_steps(trainer)
    assert norm.device.type == "meta" and trainer.log.sums.device.type == "meta"


@pytest.mark.parametrize("net, said", MISTAKES)
def test_a_planted_wait_is_found_in_a_training_step(net, said):
    with pytest.raises(Exception, match=said):
        two_steps(meta_trainer(net))


def test_the_loop_looks_at_the_losses_when_a_line_is_due(monkeypatch, tmp_path):
    """On a CPU at every step, which costs nothing there; `meta` stands for all other devices."""
    trainer, seen = meta_trainer(Tiny, max_steps=9, log_every=3, save_every=9), []
    monkeypatch.setattr(Trainer, "_check_finite", lambda self, step, norm, run: seen.append(step))
    monkeypatch.setattr(Trainer, "_report", lambda *_: None)
    monkeypatch.setattr(Trainer, "_save", lambda self, step, run: (tmp_path / "step-9").mkdir())
    with StopSignal() as stop:
        trainer.loop(_Run(tmp_path, {}, stop))
    assert seen == [3, 6, 9]


# ---- on a GPU that is there: what neither sees (bf16, pinned memory, fused kernels)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def strict():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_a_training_step_on_a_gpu_waits_for_nothing(strict, precision, checkpointing):
    fields = dict(precision=precision, compile="off", checkpointing=checkpointing)
    config = DiffusionConfig(batch_size=4, timesteps_diff=50, **fields)
    data = PictureData(torch.zeros(SHAPE, dtype=torch.uint8))
    trainer = Trainer(config.new_denoiser(SMALL), data, config)
    trainer.step(1, trainer.batch(1, data.pictures))
    (drawn,) = ahead([trainer._drawn(2, data.pictures)], "cuda")
    assert all(x.is_pinned() for x in drawn)  # torch does not see a copy from plain memory
    strict()
    norm = trainer.step(2, trainer._sent(drawn))
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(norm)


@needs_gpu
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", SAMPLERS)
def test_a_walk_on_a_gpu_waits_for_nothing(strict, method, prediction):
    denoiser = Denoiser(UNet(SMALL).cuda(), CosineNoiseScheduler(50), prediction).eval()
    with _NoiseAhead([stream(0, i) for i in range(4)], SHAPE[1:], "cuda", 20) as noise:
        x = noise()
        SAMPLERS[method](denoiser, denoiser.scheduler, x, WALK[-2:], noise)
        strict()
        x = SAMPLERS[method](denoiser, denoiser.scheduler, x, WALK, noise)
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x).all()


@needs_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compile", ["on", "graphs"])
def test_a_compiled_run_on_a_gpu_is_the_eager_one(tmp_path, compile, checkpointing):
    losses, pictures = [], torch.randint(0, 256, (16, 1, 16, 16), dtype=torch.uint8)
    for how in ("off", compile):
        config = DiffusionConfig(
            batch_size=16,
            max_steps=30,
            log_every=1,
            learning_rate=1e-2,
            precision="float32",
            compile=how,
            checkpointing=checkpointing and how == compile,
            out_dir=str(tmp_path / how),
        )
        note = lambda line, trainer: losses.append(line["loss"])  # noqa: E731
        network = replace(SMALL, dropout=0.0)
        train_diffusion(config, network, data=pictures, progress=False, callback=note)
    eager, compiled = np.array(losses).reshape(2, -1)
    assert eager[-1] < 0.7 * eager[0]  # it has learned something: the network counts
    assert compiled[:8] == pytest.approx(eager[:8], rel=1e-2)
