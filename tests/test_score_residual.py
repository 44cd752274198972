"""score_residual and score_combination: the formula, its gradient, every backend, strides, dtypes, errors."""

import pytest
import torch
from close import BACKENDS, DEVICES, NEEDS_LIBRARY, assert_as_good, assert_close, library_on
from torch.utils._python_dispatch import TorchDispatchMode

from palp_fast import functional as PF

# 4 x 16 x 17 = 1088 elements: one tile of the kernels (C++, CUDA) and a rest.
SHAPE = (3, 4, 16, 17)
TILE, RUN, LANES = 1024, 256, 16  # elements of the C++ kernel's loops, from outermost to innermost
MOST_TERMS = 8
NAMES = ("pred", "target", "teacher_cond", "teacher_uncond", "student_cond", "student_uncond")


def images(dtype=torch.float32, shape=SHAPE):
    """pred, target and four predictions that differ by about 5 %, as guided predictions do."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    others = [base + 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    return [value.to(dtype) for value in (base, *others)]


def weights(shape=SHAPE):
    generator = torch.Generator().manual_seed(1)
    draw = {name: torch.rand(shape[0], generator=generator) + 0.1 for name in ("residual_scale", "sample_weight")}
    mask = torch.rand((shape[0], 1, *shape[2:]), generator=generator)
    return {**draw, "mask": mask, "residual_weight": 0.3}


OPTIONS = [{}, weights(), {"residual_weight": 0.0}]
IDS = ["plain", "weighted", "no residual"]


def formula(values, alpha, beta, residual_weight=1.0, residual_scale=None, sample_weight=None, mask=None, dtype=None):
    """Loss, stats and gradient to pred, written out with whole tensors as in PALP.md step 4."""
    values = [value.to(dtype or torch.float64) for value in values]
    p, x, tc, tu, sc, su = values
    batch = p.shape[0]
    ones = torch.ones(batch, dtype=p.dtype)
    c, w = (ones if v is None else v.to(p.dtype) for v in (residual_scale, sample_weight))
    c, w = c.view(-1, 1, 1, 1), w.view(-1, 1, 1, 1)
    m = torch.ones_like(p[:, :1]) if mask is None else mask.to(p.dtype)
    r = (tu + alpha * (tc - tu)) - (su + beta * (sc - su))
    unweighted = 2 * m * (p - x) - residual_weight * c * r
    loss = (w * (m * (p - x) ** 2 - residual_weight * c * r * p)).sum() / p.numel()
    mean = [(m * (p - x) ** 2).mean((1, 2, 3)), (r**2).mean((1, 2, 3)).sqrt(), (unweighted**2).mean((1, 2, 3)).sqrt()]
    return loss, torch.stack(mean, 1), w * unweighted / p.numel()


def run(values, backend, alpha=15.0, beta=7.5, upstream=1.0, **options):
    """(loss, stats, gradient to pred) of the operator."""
    pred = values[0].detach().requires_grad_()
    loss, stats = PF.score_residual(pred, *values[1:], alpha=alpha, beta=beta, backend=backend, **options)
    (grad,) = torch.autograd.grad(loss, pred, torch.tensor(upstream, dtype=loss.dtype))
    return loss, stats, grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_against_the_formula(backend, options, dtype):
    values = images(dtype)
    made = run(values, backend, **options)
    # All arithmetic is fp32 whatever the inputs, so fp32 PyTorch is the peer; only the gradient is rounded, once.
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    peer, truth = (formula(values, 15.0, 7.5, **options, dtype=d) for d in (compute, torch.float64))
    assert [value.dtype for value in made] == [compute, compute, dtype]
    assert not made[1].requires_grad
    floor = 1e-14 if dtype == torch.float64 else 1e-6
    for name, mine, its, true in zip(("loss", "stats"), made, peer, truth):
        assert_as_good(mine, its, true, floor, name)
    assert_as_good(made[2], peer[2].to(dtype), truth[2], floor, "gradient")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_library_equals_the_reference(device, options, dtype):
    library = library_on(device)
    there = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    made = run([value.to(device) for value in images(dtype)], library, **there)
    for mine, its in zip(made, run(images(dtype), "reference", **options)):
        assert_close(mine, its, 2e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    values = images(torch.float64, (2, 3, 2, 3))
    options = {k: v.double() if torch.is_tensor(v) else v for k, v in weights((2, 3, 2, 3)).items()}

    def loss(pred):
        return PF.score_residual(pred, *values[1:], alpha=3.0, beta=2.0, backend=backend, **options)[0]

    assert torch.autograd.gradcheck(loss, values[0].requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_scaled_by_the_upstream_and_rounded_once(backend):
    values = images(torch.float16)
    _, _, truth = formula(values, 15.0, 7.5)
    # Divided by numel first, this gradient would be subnormal or 0 in fp16.
    _, _, grad = run(values, backend, upstream=65536.0)
    assert_close(grad, 65536 * truth, 4e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_of_equal_guidance_is_exactly_zero(backend):
    pred, target, cond, uncond, *_ = images()
    _, stats, grad = run([pred, target, cond, uncond, cond, uncond], backend, alpha=7.3, beta=7.3)
    assert torch.equal(stats[:, 1], torch.zeros(3))
    assert_close(grad, 2 * (pred - target) / pred.numel(), 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_predictions_may_be_missing(backend):
    values = images()
    full = run(values, backend, alpha=1.0, beta=1.0)
    short = run([*values[:3], None, values[4], None], backend, alpha=1.0, beta=1.0)
    for mine, its in zip(short, full):
        assert torch.equal(mine, its)
    run([*values[:2], None, values[3], None, values[5]], backend, alpha=0.0, beta=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", range(MOST_TERMS + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combination_of_any_number_of_terms(device, count, dtype):
    library = library_on(device)
    draw = torch.Generator().manual_seed(count)
    terms = [value.to(dtype) for value in torch.randn(count, *SHAPE, generator=draw)]
    # A column of a wider table: its rows are not contiguous.
    coefficients = torch.randn(3, count + 1, generator=draw).t()[:count]
    pred, target, *_ = images()
    residual = sum((c.view(-1, 1, 1, 1) * v.double() for c, v in zip(coefficients, terms)), torch.zeros(SHAPE))
    pred.requires_grad_()
    for backend in (library, "reference"):
        arguments = [[value.to(device) for value in terms], coefficients.to(device)]
        loss, stats = PF.score_combination(pred.to(device), target.to(device), *arguments, backend=backend)
        (grad,) = torch.autograd.grad(loss, pred)
        assert_close(stats[:, 1], residual.square().mean((1, 2, 3)).sqrt(), 1e-6)
        # fp32 arithmetic: at most 8 products and sums, 6e-8 each.
        assert_close(grad, (2 * (pred - target) - residual) / pred.numel(), 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_around_the_loops_in_memory_full_of_nan(device, dtype):
    """One element less and more than each loop of the kernels takes; what lies around an image is never read."""
    library = library_on(device)
    for size in (1, *(whole + more for whole in (LANES, RUN, TILE, 2 * TILE) for more in (-1, 0, 1))):
        values = images(dtype, (2, 1, 1, size))
        around = torch.full((6, 2, 3, 1, size + 6), float("nan"), dtype=dtype, device=device)
        around[:, :, 1:2, :, 3:-3] = torch.stack(values).to(device)
        made = run(list(around[:, :, 1:2, :, 3:-3]), library)
        # The loss is a small difference of large terms here. The gradient is rounded once, to 8 bits or 11.
        rounding = {torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 6e-4}[dtype]
        for mine, true, tolerance in zip(made, formula(values, 15.0, 7.5), (5e-5, 5e-6, rounding)):
            assert_close(mine, true, tolerance, f"{size} elements")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    values, options = images(), weights()
    expected = run(values, backend, **options)
    padded = [torch.full((6, 5, 16, 20), float("nan")) for _ in values]
    for whole, value in zip(padded, values):
        whole[::2, 1:, :, 3:] = value
    layouts = (
        [value.to(memory_format=torch.channels_last) for value in values],
        [whole[::2, 1:, :, 3:] for whole in padded],
        [value.transpose(2, 3).contiguous().transpose(2, 3) for value in values],
        [values[0], values[1], *torch.cat(values[2:]).chunk(4)],
    )
    for layout in layouts:
        for mine, its in zip(run(layout, backend, **options), expected):
            assert_close(mine, its, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend):
    values = images()
    kinds = (torch.bfloat16, torch.float32, torch.float16, torch.float16, torch.bfloat16, torch.float32)
    mixed = [value.to(kind) for value, kind in zip(values, kinds)]
    for mine, true in zip(run(mixed, backend), formula(mixed, 15.0, 7.5)):
        assert_close(mine, true, 4e-3 if mine.dtype == torch.bfloat16 else 5e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_one_batched_prediction(device, memory_format, dtype):
    """Views of what a UNet predicts for several prompts at once, every dtype and layout it may return."""
    library = library_on(device)
    values = images(dtype)
    batch = torch.cat(values).to(device).contiguous(memory_format=memory_format)
    made = run(list(batch.unflatten(0, (6, SHAPE[0])).unbind(0)), library)
    for mine, its in zip(made, run(values, "reference")):
        assert_close(mine, its, 2e-6)


def test_bool_mask_and_expanded_prediction():
    values = images()
    mask = weights()["mask"] > 0.5
    made = run(values, "auto", mask=mask)
    for mine, true in zip(made, formula(values, 15.0, 7.5, mask=mask)):
        assert_close(mine, true, 5e-6)
    values[3] = values[3][:1].expand(SHAPE)
    assert_close(run(values, "auto")[2], formula(values, 15.0, 7.5)[2], 5e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_large_images(device):
    """Results of more than 4 MiB, which lie on large pages where the system has them."""
    values = images(shape=(2, 4, 384, 384))
    made = run([value.to(device) for value in values], library_on(device))
    for mine, its in zip(made, run(values, "reference")):
        assert_close(mine, its, 2e-6)


def test_thread_count_does_not_matter():
    values = images(shape=(4, 4, 64, 64))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(values, "auto"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(other, results[0]))


def test_a_loss_without_gradient_to_pred_has_none():
    pred, *others = images()
    loss, _ = PF.score_residual(pred, *(value.requires_grad_() for value in others), alpha=3.0, beta=2.0)
    assert not loss.requires_grad


def test_nothing_but_pred_gets_a_gradient():
    values = [value.requires_grad_() for value in images()]
    options = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in weights().items()}
    loss, _ = PF.score_residual(*values, alpha=3.0, beta=2.0, **options)
    loss.backward()
    assert values[0].grad is not None
    assert all(value.grad is None for value in [*values[1:], *(v for v in options.values() if torch.is_tensor(v))])


def test_backward_is_one_operator():
    """Results without a gradient cost nothing: torch would make zeros for each of them."""
    values = images()
    pred = values[0].requires_grad_()
    loss, _ = PF.score_residual(pred, *values[1:], alpha=3.0, beta=2.0)
    upstream = torch.ones(())
    with Recorder() as recorder:
        torch.autograd.grad(loss, pred, upstream)
    assert recorder.names == ["palp_fast.score_combination_bwd.default"]


def test_a_kept_graph_gives_the_same_gradient_again():
    """What was saved is overwritten by the last backward pass alone."""
    values = images()
    pred = values[0].requires_grad_()
    loss, _ = PF.score_residual(pred, *values[1:], alpha=3.0, beta=2.0)
    first, second, last = (torch.autograd.grad(loss, pred, retain_graph=kept)[0] for kept in (True, True, False))
    assert torch.equal(first, second) and torch.equal(first, last)


class Recorder(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_second_derivatives_are_refused():
    values = images()
    pred = values[0].requires_grad_()
    loss, _ = PF.score_residual(pred, *values[1:], alpha=3.0, beta=2.0)
    upstream = torch.ones_like(loss).requires_grad_()
    (grad,) = torch.autograd.grad(loss, pred, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (3, 0, 2, 2), (3, 4, 2, 0)])
def test_empty_tensors(backend, shape):
    loss, stats, grad = run(images(shape=shape), backend)
    assert loss == 0 and torch.equal(stats, torch.zeros(shape[0], 3)) and grad.shape == shape


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload):
    values, options = images(shape=(2, 3, 4, 5)), weights((2, 3, 4, 5))
    op = getattr(torch.ops.palp_fast.score_combination, overload)
    vectors = (options["residual_scale"], options["sample_weight"], options["mask"])
    pred, target, *predictions = (value.requires_grad_() for value in values)
    torch.library.opcheck(op, (pred, target, predictions, [1.0, -2.0, 0.5, 3.0], torch.rand(4, 2), 0.5, *vectors))
    torch.library.opcheck(op, (pred.detach(), target, predictions[:1], [2.0], None, 1.0, None, None, None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend):
    values, options = images(), weights()

    def loss(pred, alpha):
        return PF.score_residual(pred, *values[1:], alpha=alpha, beta=2.0, backend=backend, **options)[0] * 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for alpha in (3.0, 5.0):
        pred = values[0].detach().requires_grad_()
        results = [torch.autograd.grad(function(pred, alpha), pred)[0] for function in (compiled, loss)]
        assert_close(*results, 1e-7)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"pred": torch.ones(3, 4)}, "pred has shape"),
        ({"pred": 1.0}, "pred"),
        ({"target": torch.ones(3, 4, 16, 16)}, "target has shape"),
        ({"target": torch.ones(SHAPE, dtype=torch.int64)}, "target has dtype"),
        ({"teacher_cond": None}, "teacher_cond=None"),
        ({"student_uncond": torch.ones(SHAPE, device="meta")}, "student_uncond is on meta"),
        ({"alpha": float("inf")}, "alpha"),
        ({"beta": None}, "beta"),
        ({"residual_weight": True}, "residual_weight"),
        ({"residual_scale": torch.ones(2)}, "residual_scale has shape"),
        ({"sample_weight": torch.ones(3, 1)}, "sample_weight has shape"),
        ({"mask": torch.ones(SHAPE)}, "mask has shape"),
        ({"backend": "numpy"}, "backend='numpy'"),
    ],
)
def test_bad_arguments_are_named(change, name):
    arguments = {**dict(zip(NAMES, images())), "alpha": 2.0, "beta": 2.0, **change}
    with pytest.raises((ValueError, TypeError), match=name):
        PF.score_residual(**arguments)


def test_bad_arguments_of_the_combination_are_named():
    pred, target, *predictions = images()
    with pytest.raises(ValueError, match=r"coefficients has shape \[3, 4\]: allowed is \[4, 3\]"):
        PF.score_combination(pred, target, predictions, torch.ones(3, 4))
    with pytest.raises(ValueError, match="predictions has 9 tensors: allowed are at most 8"):
        PF.score_combination(pred, target, [pred] * 9, torch.ones(9, 3))
    with pytest.raises(TypeError, match="predictions"):
        PF.score_combination(pred, target, predictions[0], torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="no Triton version of score_combination"):
        PF.score_combination(pred, target, predictions, torch.ones(4, 3), backend="triton")


@NEEDS_LIBRARY
def test_bad_arguments_of_the_operator_itself_are_named():
    """What functional checks, checked again where memory is read."""
    x, factors = torch.ones(SHAPE), [1.0] * 9
    for predictions, weights, coefficients, message in (
        ([x] * 9, factors, None, "predictions has 9 tensors: allowed are at most 8"),
        ([x] * 2, factors[:3], None, "factors has 3 values: allowed are 2"),
        ([x], factors[:1], torch.ones(2, 3), r"coefficients: allowed is \[1, 3\]"),
        ([x[:2]], factors[:1], None, r"predictions has shape \[2, 4, 16, 17\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.palp_fast.score_combination(x, x, predictions, weights, coefficients, 1.0, None, None, None)
    with pytest.raises(RuntimeError, match="grad_output has 3 elements: allowed is a scalar"):
        torch.ops.palp_fast.score_combination_bwd(torch.ones(3), x, torch.float32)
