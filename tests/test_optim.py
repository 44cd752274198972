"""8-bit optimizers: the scheme against fp64, behaviour as a torch.optim.Optimizer, safety."""

import copy

import pytest
import torch

from palp_fast import doctor
from palp_fast.optim import AdamW, AdamW8bit, Lion8bit
from palp_fast.reference.blockwise import dynamic_levels

OPTIMIZERS = (AdamW8bit, Lion8bit)
SHAPES = ((3, 100), (256,), (257,), (1,), (16, 64))


def tensors(seed: int = 0, scale: float = 1.0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(scale * torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_grads(params, seed: int, scale: float = 1.0) -> None:
    for param, grad in zip(params, tensors(seed, scale)):
        param.grad = grad.detach().clone()


def train(optimizer, params, steps, first=0) -> None:
    for step in range(first, first + steps):
        set_grads(params, 100 + step)
        optimizer.step()


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right))


def adamw_fp64(params, seeds, scale, *, lr, betas, eps, weight_decay):
    """The scheme in fp64, tensor by tensor: quantised moments read, update from the new ones, quantised again."""
    params = [param.detach().double() for param in params]
    state = [[torch.zeros(-(-p.numel() // 256), 256, dtype=torch.float64) for _ in range(2)] for p in params]
    for step, seed in enumerate(seeds, start=1):
        for index, grad in enumerate(tensors(seed, scale)):
            size = grad.numel()
            grad = torch.nn.functional.pad(grad.detach().double().flatten(), (0, -size % 256)).view(-1, 256)
            first = betas[0] * state[index][0] + (1 - betas[0]) * grad
            second = betas[1] * state[index][1] + (1 - betas[1]) * grad**2
            update = first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
            params[index] *= 1 - lr * weight_decay
            params[index] -= lr * update.flatten()[:size].view(params[index].shape)
            state[index] = [nearest(first, True), nearest(second, False)]
    return params


def nearest(values, signed):
    levels = dynamic_levels(signed).double()
    scales = values.abs().amax(1, keepdim=True)
    distance = (values / scales.clamp(min=1e-300))[..., None] - levels
    return levels[distance.abs().argmin(-1)] * scales


# Wide scales: gradients of one narrow scale leave mistakes in the state unseen.
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_adamw_follows_the_scheme_in_fp64(scale):
    params = tensors()
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    truth = adamw_fp64(params, range(10, 15), scale, **options)
    optimizer = AdamW8bit(params, **options)
    for seed in range(10, 15):
        set_grads(params, seed, scale)
        optimizer.step()
    off = torch.cat([(p - t).abs().flatten() for p, t in zip(params, truth)])
    # A value half-way between two levels may fall to either side; such an element differs visibly, and is rare.
    assert (off > 1e-5).double().mean() < 2e-3


def test_lion_first_steps():
    params = tensors()
    start = [param.detach().clone() for param in params]
    optimizer = Lion8bit(params, lr=0.5, betas=(0.9, 0.99), weight_decay=0.1)
    set_grads(params, 1)
    grads = [param.grad.clone() for param in params]
    optimizer.step()
    for param, before, grad in zip(params, start, grads):
        torch.testing.assert_close(param.detach(), before * (1 - 0.05) - 0.5 * grad.sign())
    train(optimizer, params, 1)
    assert all(param.isfinite().all() for param in params)


# Lion has no peer in torch: its own 32-bit state takes that place.
@pytest.mark.parametrize(
    ("make", "peer"),
    [(AdamW8bit, torch.optim.AdamW), (Lion8bit, lambda params, lr: Lion8bit(params, lr=lr, min_8bit_size=2**40))],
)
def test_regression_learns_as_with_32_bits(make, peer):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 32, generator=generator)
    targets = torch.tanh(inputs @ torch.randn(32, 8, generator=generator))

    def final_loss(make_optimizer, lr):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
        optimizer = make_optimizer(model.parameters(), lr=lr)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    lr = 1e-3 if make is AdamW8bit else 1e-4
    mine, its = final_loss(make, lr), final_loss(peer, lr)
    assert abs(mine - its) < 0.03 * its


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_grouping_does_not_change_the_update(kind):
    together, apart = tensors(), tensors()
    one = kind(together, lr=0.1)
    many = kind(apart[:2], lr=0.1)
    many.add_param_group({"params": apart[2:]})
    train(one, together, 3)
    train(many, apart, 3)
    assert same(together, apart)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("least", [0, 300])
def test_state_round_trip_is_exact(kind, least):
    params = tensors()
    optimizer = kind(params, lr=0.1, min_8bit_size=least)
    train(optimizer, params, 3)
    other = [torch.nn.Parameter(param.detach().clone()) for param in params]
    restored = kind(other, lr=7.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, 3, first=3)
    train(restored, other, 3, first=3)
    assert same(params, other)
    assert restored.state[other[0]]["step"] == 6


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_copy_goes_on_alone(kind):
    params = tensors()
    optimizer = kind(params, lr=0.1, max_grad_norm=1.0)
    train(optimizer, params, 2)
    twin_params, twin = copy.deepcopy((params, optimizer))
    train(optimizer, params, 2, first=2)
    train(twin, twin_params, 2, first=2)
    assert same(params, twin_params) and twin.max_grad_norm == 1.0


def test_state_is_eight_bits_and_blocks_do_not_cross_tensors():
    params = tensors()
    optimizer = AdamW8bit(params)
    train(optimizer, params, 1)
    for param in params:
        state = optimizer.state[param]
        assert state["exp_avg_codes"].dtype == state["exp_avg_sq_codes"].dtype == torch.uint8
        assert state["exp_avg_codes"].shape == (-(-param.numel() // 256), 256)
        assert torch.allclose(state["exp_avg_scales"].max(), 0.1 * param.grad.abs().max())


def test_min_8bit_size_is_told():
    params = tensors()
    optimizer = AdamW8bit(params, min_8bit_size=257)
    train(optimizer, params, 1)
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.float32
    assert "exp_avg_codes" in optimizer.state[params[2]]
    assert "2 of 5 tensors (257 elements) keep 32-bit state" in repr(optimizer)
    assert "2 of 5 tensors (257 elements) keep 32-bit state" in doctor.report(optimizer)
    assert "32-bit" not in repr(AdamW8bit(tensors()))
    assert "8 bits for every tensor" in doctor.report(AdamW8bit(tensors()))
    assert "all 5 tensors have 32-bit state" in doctor.report(AdamW(tensors()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_changes_nothing(kind, bad):
    params, twin_params = tensors(), tensors()
    optimizer, twin = kind(params[:3], lr=0.1), kind(twin_params, lr=0.1)
    optimizer.add_param_group({"params": params[3:]})
    train(optimizer, params, 2)
    before = [param.detach().clone() for param in params]
    set_grads(params, 5)
    params[1].grad[7] = bad
    optimizer.step()
    assert same(params, before) and optimizer.skipped_steps == 1
    train(optimizer, params, 2, first=2)
    train(twin, twin_params, 4)
    assert same(params, twin_params) and twin.skipped_steps == 0


def test_large_finite_gradient_is_no_reason_to_skip():
    params = tensors()
    optimizer = AdamW8bit(params, max_grad_norm=1.0)
    set_grads(params, 1, scale=1e30)
    optimizer.step()
    assert optimizer.skipped_steps == 0 and all(param.isfinite().all() for param in params)


def test_clip_is_clip_grad_norm_over_all_groups():
    params, twin_params = tensors(), tensors()
    clipped = AdamW8bit([{"params": params[:2]}, {"params": params[2:], "lr": 0.2}], lr=0.1, max_grad_norm=0.5)
    plain = AdamW8bit([{"params": twin_params[:2]}, {"params": twin_params[2:], "lr": 0.2}], lr=0.1)
    for step in range(3):
        set_grads(params, step)
        set_grads(twin_params, step)
        norm = torch.nn.utils.clip_grad_norm_(twin_params, 0.5)
        clipped.step()
        plain.step()
        torch.testing.assert_close(clipped.grad_norm, norm)
    torch.testing.assert_close(params, twin_params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_missing_gradients_leave_their_tensors_alone(kind):
    params, twin_params = tensors(), tensors()
    optimizer, twin = kind(params, lr=0.1), kind(twin_params[1:], lr=0.1)
    before = params[0].detach().clone()
    for step in range(3):
        set_grads(params, step)
        set_grads(twin_params, step)
        params[0].grad = None
        optimizer.step()
        twin.step()
    assert torch.equal(params[0], before) and same(params[1:], twin_params[1:])
    assert optimizer.state[params[0]]["step"] == 0
    optimizer.zero_grad()
    optimizer.step()
    assert same(params[1:], twin_params[1:])


def test_closure_and_scheduler():
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW8bit([param], lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = param.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    torch.testing.assert_close(param.detach(), torch.zeros(4), atol=1e-6, rtol=0)
    scheduler.step()
    optimizer.step(closure)
    torch.testing.assert_close(param.detach(), torch.full((4,), -0.5), atol=1e-2, rtol=0)


def test_grad_scaler_values_are_honoured():
    params, twin_params = tensors(), tensors()
    scaled, plain = AdamW8bit(params, max_grad_norm=1.0), AdamW8bit(twin_params, max_grad_norm=1.0)
    set_grads(params, 0, scale=1024.0)
    set_grads(twin_params, 0)
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    scaled.step()
    plain.step()
    torch.testing.assert_close(params, twin_params)
    before = [param.detach().clone() for param in params]
    scaled.found_inf = torch.tensor(1.0)
    scaled.step()
    assert same(params, before) and scaled.skipped_steps == 1


def test_half_precision_parameters_and_empty_ones():
    params = [torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16)), torch.nn.Parameter(torch.empty(0, 4))]
    optimizer = AdamW8bit(params, lr=0.25, weight_decay=0.0)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(params[0].detach(), torch.full((300,), 0.75, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": -1.0}, "lr=-1.0: allowed is a finite number >= 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"betas": (0.9, 1.0)}, "betas=.0.9, 1.0.: allowed are two numbers"),
        ({"betas": 0.9}, "betas=0.9"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"block_size": 100}, "block_size=100: allowed is a power of two"),
        ({"min_8bit_size": -1}, "min_8bit_size"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_bad_arguments_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        AdamW8bit(tensors(), **options)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_parameters_may_move_in_memory(kind):
    params, twin_params = tensors(), tensors()
    optimizer, twin = kind(params, lr=0.1), kind(twin_params, lr=0.1)
    for step in range(3):
        train(optimizer, params, 1, first=step)
        train(twin, twin_params, 1, first=step)
        for param in params:
            param.data = param.data.clone()
    assert same(params, twin_params)


@pytest.mark.parametrize("size", [100, 600])
def test_parameter_of_another_size_is_refused(size):
    params = tensors()
    optimizer = AdamW8bit(params)
    train(optimizer, params, 1)
    params[1].data = params[1].data[:size] if size < 256 else torch.zeros(size)
    params[1].grad = torch.zeros(size)
    with pytest.raises(ValueError, match=f"parameter 1 has {size} elements: allowed are 256"):
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_serves_another_backend_and_comes_back_from_a_file(kind, tmp_path):
    params = tensors()
    optimizer = kind(params, lr=0.1)
    train(optimizer, params, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = [torch.nn.Parameter(param.detach().clone()) for param in params]
    restored = kind(other, lr=0.1, backend="reference")
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for param, twin in zip(params, other):
        left, right = optimizer.state[param], restored.state[twin]
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_fp32_adamw_goes_on_from_torchs_state():
    params, twin_params = tensors(), tensors()
    theirs = torch.optim.AdamW(twin_params, lr=0.1)
    train(theirs, twin_params, 2)
    for param, twin in zip(params, twin_params):
        param.data.copy_(twin.data)
    ours = AdamW(params, lr=0.1)
    ours.load_state_dict(theirs.state_dict())
    train(ours, params, 2, first=2)
    train(theirs, twin_params, 2, first=2)
    torch.testing.assert_close(params, twin_params, rtol=1e-5, atol=1e-6)


def test_scaler_that_is_not_finite_changes_nothing():
    params = tensors()
    optimizer, before = AdamW8bit(params), [param.detach().clone() for param in params]
    set_grads(params, 0)
    for scale in (0.0, float("nan")):
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
    assert same(params, before) and optimizer.skipped_steps == 2


def test_bad_shadows_are_named():
    param, half = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    copy16 = torch.empty(4, dtype=torch.bfloat16)
    for params, shadows in (([param], {half: copy16}), ([half], {half: copy16}), ([param], {param: torch.empty(4)}),
                            ([param], {param: copy16[:2]})):
        with pytest.raises(ValueError, match="shadows"):
            AdamW8bit(params, shadows=shadows)


def test_state_of_another_layout_is_refused():
    params = tensors()
    optimizer = AdamW8bit(params)
    train(optimizer, params, 1)
    with pytest.raises(ValueError, match="optimizer state"):
        AdamW8bit([torch.nn.Parameter(torch.ones(2000)) for _ in params]).load_state_dict(optimizer.state_dict())
