"""The loss, the batches, the loop, the optimizer and the schedule."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import lively_codec, photo_like, quantized_codec

from lic.codec.model import Output
from lic.files import LicError
from lic.images import Images, dead_leaves
from lic.train.batches import draw
from lic.train.loop import fit
from lic.train.loss import level_weights, mean_loss, rate_distortion
from lic.train.optimizer import CLIP_NORM, NEWTON_SCHULZ, SCALE_RATE, Optimizer, orthogonal
from lic.train.progress import Progress
from lic.train.schedule import learning_rate, milestones
from lic.train.state import load_state, save_state


def test_learning_rate_warms_up_stays_and_declines_to_a_fiftieth():
    rates = np.array([learning_rate(step, 1000, 1.0) for step in range(1001)])
    assert rates[0] == pytest.approx(1 / 20) and (np.diff(rates[:20]) > 0).all()
    assert (rates[20:334] == 1).all()
    assert (np.diff(rates[333:]) < 0).all() and rates[-1] == pytest.approx(0.02)


def one_step(lr, scale=1.0):
    """Parameters before and after one step along a random gradient of every rank."""
    model = lively_codec().to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model)
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = scale * torch.randn_like(p)
    optimizer.step(lr)
    return before, dict(model.named_parameters())


def test_every_parameter_is_trained_by_exactly_one_optimizer():
    for model, scales in ((lively_codec(), 0), (quantized_codec(), 8)):
        optimizer = Optimizer(model.to(memory_format=torch.channels_last))
        assert len(optimizer.kernels) == 14 and all(p.ndim == 4 for p in optimizer.kernels)
        assert len(optimizer.scales) == len(optimizer.logs) == scales
        trained = optimizer.kernels + optimizer.scales + optimizer.others
        assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))
        by_adam = [p for group in optimizer.adam.param_groups for p in group["params"]]
        assert list(map(id, by_adam)) == list(map(id, optimizer.others + optimizer.logs))
        for kernel in optimizer.kernels:
            assert optimizer.matrix(kernel).data_ptr() == kernel.data_ptr()


def test_a_step_changes_a_scale_by_a_share_of_it():
    """However small the scale is; and it stays positive."""
    model = quantized_codec().to(memory_format=torch.channels_last)
    optimizer = Optimizer(model)
    before = [scale.item() for scale in optimizer.scales]
    for rate in (1e-3, 3.0):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(rate)
        after = [scale.item() for scale in optimizer.scales]
        assert all(scale > 0 for scale in after)
        if rate == 1e-3:
            for old, new in zip(before, after):
                assert 1 - new / old == pytest.approx(SCALE_RATE * rate, rel=0.02)


def test_one_step_moves_everything_and_a_kernel_in_all_directions_alike():
    before, after = one_step(1e-3)
    for name, p in after.items():
        assert not torch.equal(p, before[name]) and p.grad is None, name
        if p.ndim == 4:
            step = (p.detach() - before[name]).flatten(1)
            values = torch.linalg.svdvals(step) / (0.2 * 1e-3 * max(step.shape) ** 0.5)
            assert 0.4 < values.min() and values.max() < 1.4, (
                name
            )  # orthogonal but for 5 Newton-Schulz iterations


@pytest.mark.parametrize("shape", [(64, 1600), (192, 75), (1, 25)])
@pytest.mark.parametrize(
    "octaves", [0, 10, 40], ids=lambda octaves: f"singular values over {octaves} octaves"
)
def test_orthogonal_is_newton_schulz_on_the_singular_values(shape, octaves):
    generator = torch.Generator().manual_seed(0)
    U, S, Vt = torch.linalg.svd(
        torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False
    )
    S = S * 2 ** -torch.linspace(0, octaves, len(S), dtype=torch.float64)
    a, b, c = NEWTON_SCHULZ
    expected = S / S.norm()
    for _ in range(5):
        expected = a * expected + b * expected**3 + c * expected**5
    result = orthogonal((U * S @ Vt).float()).double()
    assert (result - U * expected @ Vt).norm() < 2e-3 * expected.norm()
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_kernels_are_trained_as_by_torchs_muon_but_for_its_bf16():
    model = lively_codec().to(memory_format=torch.channels_last)
    optimizer = Optimizer(model)
    matrices = [
        torch.nn.Parameter(optimizer.matrix(kernel).clone()) for kernel in optimizer.kernels
    ]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    start = [matrix.detach().clone() for matrix in matrices]
    torch.manual_seed(0)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for kernel, matrix in zip(optimizer.kernels, matrices):
            matrix.grad = optimizer.matrix(kernel.grad).clone()
        optimizer.step(1e-2)
        muon.step()
    for kernel, matrix, before in zip(optimizer.kernels, matrices, start):
        moved, expected = optimizer.matrix(kernel) - before, matrix.detach() - before
        assert (
            (moved - expected).norm() < 0.02 * expected.norm()
        )  # 0.011 here, all of it bf16; a momentum of 0.90 or 0.98 is 0.03 off


def test_a_kernels_step_does_not_depend_on_the_size_of_the_gradient():
    _, a = one_step(1e-3)
    _, b = one_step(1e-3, scale=128.0)
    assert torch.equal(a["g_s.conv2.weight"], b["g_s.conv2.weight"])


def test_kernels_trained_in_the_fourier_domain_take_the_same_steps():
    """A kernel's real DFT is a rotation of its 25 numbers, and Muon's step does not depend on
    the basis."""
    k = torch.arange(5.0)
    angle = 2 * torch.pi * k[:, None] * k / 5
    dft = (torch.cos(angle) + torch.sin(angle)) / 5**0.5  # Hartley's: real, and its own inverse
    start = 0.1 * torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    target = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1))

    def trained(transform):
        module = torch.nn.Module()
        module.kernel = torch.nn.Parameter(
            transform(start).contiguous(memory_format=torch.channels_last)
        )
        module.rest = torch.nn.Parameter(torch.ones(1))
        optimizer = Optimizer(module)
        for _ in range(50):
            (
                (transform(module.kernel) - target).square().mean() + module.rest.square().sum()
            ).backward()
            optimizer.step(1e-2)
        return transform(module.kernel).detach()

    plain, fourier = trained(lambda v: v), trained(lambda v: dft @ v @ dft)
    assert (plain - start).norm() > 0.2 * start.norm()
    assert (plain - fourier).norm() < 0.02 * (plain - start).norm()


def test_a_run_is_prolonged_only_before_its_rate_declines(tmp_path):
    model = lively_codec().to(memory_format=torch.channels_last)
    optimizer, path = Optimizer(model), tmp_path / "a.state"

    def resumed(done, steps, **changed):
        save_state(path, model, optimizer, done, {"steps": 20_000, "lr": 0.1}, {})
        return load_state(path, model, optimizer, {"steps": steps, "lr": 0.1} | changed)

    assert (
        resumed(6_666, 50_000) == 6_666
        and resumed(6_666, 20_000) == 6_666
        and resumed(20_000, 20_000) == 20_000
    )
    assert [learning_rate(s, 20_000, 1.0) for s in range(6_666)] == [
        learning_rate(s, 50_000, 1.0) for s in range(6_666)
    ]
    for done, steps in ((6_667, 50_000), (6_666, 19_990), (100, 10_000)):
        with pytest.raises(LicError, match="--steps can change only"):
            resumed(done, steps)
    with pytest.raises(LicError, match="lr was 0.1, is 0.2"):
        resumed(6_666, 50_000, lr=0.2)


@pytest.mark.parametrize("name", ["g_a.conv1.weight", "g_a.gdn1.beta"])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(name):
    model = lively_codec().to(memory_format=torch.channels_last)
    optimizer = Optimizer(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.get_parameter(name).grad[(0,) * model.get_parameter(name).ndim] = float("inf")
    assert not torch.isfinite(optimizer.step(1e-3))


def test_the_codec_is_one_graph_for_the_compiler_with_the_same_gradients():
    model, x, level = lively_codec(), photo_like(), torch.tensor([1.0])
    gradients = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        loss = rate_distortion(forward.train()(x, level), x, 0.01)[0].mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_steps_lower_the_loss():
    torch.manual_seed(0)
    model = lively_codec().to(memory_format=torch.channels_last)
    optimizer, x, losses = Optimizer(model), photo_like(), []
    for _ in range(30):
        model.train()
        loss = rate_distortion(model(x, torch.tensor([1.0])), x, 0.01)[0].mean()
        loss.backward()
        optimizer.step(1e-3)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_is_its_formula():
    x = torch.full((2, 3, 64, 64), 0.5)
    out = Output(x + 0.1, torch.full((2, 5), 80.0), torch.full((2, 3), 16.0))
    J, y_bpp, z_bpp, mse = rate_distortion(out, x, torch.tensor([0.01, 0.02]))
    assert y_bpp.tolist() == [400 / 4096] * 2 and z_bpp.tolist() == [48 / 4096] * 2
    expected = [448 / 4096 + lmbda * 65025 * 0.01 for lmbda in (0.01, 0.02)]
    torch.testing.assert_close(J, torch.tensor(expected))
    torch.testing.assert_close(mse, torch.full((2,), 0.01))


def test_the_weight_of_a_level_falls_as_the_root_of_lmbda_rises_with_mean_1():
    weights = level_weights([0.01, 0.04, 0.16])
    torch.testing.assert_close(weights[0] / weights, torch.tensor([1.0, 2.0, 4.0]))
    assert weights.mean().item() == pytest.approx(1)


def test_held_out_J_is_that_of_each_level_with_its_lmbda_and_real_rounding():
    model, x = lively_codec().train(), torch.cat([photo_like(), photo_like().flip(3)])
    J = mean_loss(model, x)
    assert not model.training
    expected = []
    with torch.no_grad():
        for level, lmbda in enumerate(model.lambdas):
            out = model(x, torch.full((2,), float(level)))
            expected.append(rate_distortion(out, x, lmbda)[0].mean().double())
    torch.testing.assert_close(J, torch.stack(expected), rtol=1e-5, atol=0)
    assert len(set(J.tolist())) == len(model.lambdas)


def training_arguments(path, **changed):
    defaults = {"steps": 60, "batch": 4, "crop": 64, "lr": 1e-3, "amp": False, "seed": 5}
    others = {"device": "cpu", "compile": False, "resume": False, "finish": False, "data": None}
    return Namespace(**defaults, **others, save_every=1000, out=str(path / "a.pt"), **changed)


def test_a_batch_depends_on_seed_and_step_alone_and_has_all_levels(tmp_path):
    images = Images([dead_leaves(seed, 96) for seed in range(4)])
    args = training_arguments(tmp_path)

    def batch(step, seed=5):
        return draw(step, images, 4, Namespace(**vars(args) | {"seed": seed}), (0, 1))

    first, again = batch(3), batch(3)
    assert first.noise == again.noise and torch.equal(first.pixels, again.pixels)
    for other in (batch(4), batch(3, seed=6)):
        assert other.noise != first.noise and not torch.equal(other.pixels, first.pixels)
    levels = torch.cat([batch(step).level for step in range(50)])
    counts = levels.bincount(minlength=4)
    assert len(counts) == 4 and counts.min() > 30  # of 50 expected


def test_a_step_of_the_loop_is_that_of_a_plain_loop(tmp_path):
    """Each crop has a level of its own, with its lmbda and weight, and noise in its rate."""
    images = Images([dead_leaves(seed, 96) for seed in range(4)])
    args, held_out = training_arguments(tmp_path), photo_like(64, 64)
    start = lively_codec().state_dict()
    args.steps = 2
    trained, plain = lively_codec(), lively_codec().to(memory_format=torch.channels_last)
    assert all(torch.equal(a, start[name]) for name, a in plain.state_dict().items())
    assert fit(trained, images, held_out, args) == 2

    optimizer = Optimizer(plain)
    weight = torch.tensor(plain.lambdas) ** -0.5
    for step in range(2):
        noise, pixels, level = draw(step, images, 4, args, (0, 1))
        torch.manual_seed(noise)
        x = pixels.permute(0, 3, 1, 2).float() / 255
        out = plain.train()(x, level.float())
        bits = out.y_bits.sum(1) + out.z_bits.sum(1)
        mse = (out.x_hat - x).square().mean((1, 2, 3))
        lmbda = torch.tensor(plain.lambdas)[level]
        J = bits / 64**2 + lmbda * 255**2 * mse
        (J * weight[level] / weight.mean()).mean().backward()
        optimizer.step(learning_rate(step, 2, 1e-3))
    for name, a in trained.state_dict().items():
        torch.testing.assert_close(a, plain.state_dict()[name], rtol=1e-3, atol=1e-5)
        assert not torch.equal(a, start[name]), name


def test_what_adam_trains_is_clipped_together():
    model = lively_codec().to(memory_format=torch.channels_last)
    optimizer = Optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    optimizer.step(1e-3)
    first_moments = [state["exp_avg"].flatten() for state in optimizer.adam.state.values()]
    assert torch.cat(first_moments).norm().item() == pytest.approx(0.1 * CLIP_NORM, rel=1e-3)


def test_the_gradient_of_a_scales_logarithm_is_the_scales_times_it_however_small():
    model = quantized_codec().to(memory_format=torch.channels_last)
    optimizer = Optimizer(model)
    before = [scale.item() for scale in optimizer.scales]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-9)
    optimizer.step(1e-3)
    for log, scale, old in zip(optimizer.logs, optimizer.scales, before):
        moment = optimizer.adam.state[log]["exp_avg"].item()
        assert moment == pytest.approx(0.1 * 1e-9 * old, rel=1e-3)
        assert 1 - scale.item() / old == pytest.approx(SCALE_RATE * 1e-3, rel=0.05)


def test_the_warm_up_is_a_fiftieth_of_the_steps_at_most_280():
    assert [milestones(steps)[0] for steps in (10, 1000, 14_000, 100_000)] == [1, 20, 280, 280]


def test_the_progress_line_has_means_and_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("lic.train.progress.time.monotonic", lambda: now[0])
    progress = Progress(steps=3600, done=0)
    for value in (1.0, 2.0, 3.0, 4.0):
        now[0] += 3
        progress.update(loss=torch.tensor(value))
    # 12 seconds for 4 steps: 3 a step, and 3596 of them are left
    expected = "step 4/3600  loss 2.5000  3.000 s/step  left 2:59:48\n"
    assert capsys.readouterr().out == expected


def test_another_number_of_threads_is_warned_of(tmp_path, monkeypatch, capsys):
    model = lively_codec().to(memory_format=torch.channels_last)
    optimizer, path = Optimizer(model), tmp_path / "a.state"
    save_state(path, model, optimizer, 3, {"steps": 9}, {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    load_state(path, model, optimizer, {"steps": 9})
    assert "this process has 99" in capsys.readouterr().err
