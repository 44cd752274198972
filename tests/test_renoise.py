"""renoise: PALP's second noising, its gradients, every backend, strides, dtypes, errors."""

import pytest
import torch
from close import BACKENDS, DEVICES, NEEDS_LIBRARY, assert_as_good, assert_close, library_on

from palp_fast import functional as PF

SHAPE = (3, 4, 16, 17)  # 1088 elements an image: one tile of the C++ kernel and a rest
TILE = 1024
ALPHA_BAR = torch.tensor([0.999, 0.3, 0.0047])
ALPHA_BAR_NEW = torch.tensor([0.9, 0.35, 0.01])


def images(dtype=torch.float32, shape=SHAPE):
    """x_t, eps_pred, noise and another noise."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


def formula(x_t, eps, noise, new_noise=None, new=None, copies=1, dtype=torch.float64):
    """PALP.md step 2 as it is written, by way of x0_hat."""
    x_t, eps, noise, old = (value.to(dtype) for value in (x_t, eps, noise, ALPHA_BAR))
    new = old if new is None else new.to(dtype)
    old, new = old.view(-1, 1, 1, 1), new.view(-1, 1, 1, 1)
    x0_hat = (x_t - (1 - old).sqrt() * eps) / old.sqrt()
    x_hat = new.sqrt() * x0_hat + (1 - new).sqrt() * (noise if new_noise is None else new_noise.to(dtype))
    return torch.cat([x_hat] * copies)


def run(x_t, eps, noise, new_noise=None, new=None, copies=1, backend="auto", dtype=None):
    new = None if new is None else new.to(x_t.device)
    options = {"alpha_bar_new": new, "noise_new": new_noise, "copies": copies, "dtype": dtype}
    return PF.renoise(x_t, eps, noise, ALPHA_BAR.to(x_t.device), backend=backend, **options)


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_results_are_those_of_small_ones(dtype):
    """Bit for bit: 16 MiB and more go past the caches, 16-bit images without gaps go by way of no buffer."""
    images = [torch.randn(3, 4, 512, 448, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    large = run(*images, copies=4, backend="cpu")
    assert large.nbytes >= 2**24
    apart = [image.to(memory_format=torch.channels_last) for image in images]
    small = torch.cat([
        PF.renoise(*(image[i : i + 1] for image in apart), ALPHA_BAR[i : i + 1], backend="cpu") for i in range(3)])
    assert all(torch.equal(copy, small) for copy in large.chunk(4))


VARIANTS = [{}, {"new": ALPHA_BAR_NEW}, {"copies": 3}, {"copies": 2, "new": ALPHA_BAR_NEW}]
IDS = ["same timestep", "new timestep", "copies", "both"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("new_noise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_against_the_formula(backend, variant, new_noise, dtype):
    values = images(dtype)[: 4 if new_noise else 3]
    made = run(*values, **variant, backend=backend)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    peer, truth = (formula(*values, **variant, dtype=d) for d in (compute, torch.float64))
    assert made.dtype == dtype and made.is_contiguous()
    assert_as_good(made, peer.to(dtype), truth, 1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_library_equals_the_reference(device, variant, dtype):
    results = []
    for where, backend in ((device, library_on(device)), ("cpu", "reference")):
        leaves = [value.to(where).requires_grad_() for value in images(dtype)[:3]]
        made = run(*leaves, **variant, backend=backend)
        results.append([made, *torch.autograd.grad(made.square().sum(), leaves)])
    for mine, its in zip(*results):
        assert_close(mine, its, 2e-6 if dtype == torch.float32 else 1e-14)


def test_large_timesteps_do_not_blow_up():
    """At a_t = 0.03, dividing by a_t and multiplying again would cost digits; the difference form does not divide."""
    x_t, eps, noise, _ = images()
    assert_close(PF.renoise(x_t, noise, noise, torch.full((3,), 1e-12)), x_t, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("new_noise", [False, True])
def test_gradcheck(backend, variant, new_noise):
    leaves = [value.requires_grad_() for value in images(torch.float64, (3, 2, 2, 3))]
    assert torch.autograd.gradcheck(
        lambda *v: run(*v[: 4 if new_noise else 3], **variant, backend=backend), leaves[: 3 if not new_noise else 4]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_have_the_dtypes_of_their_inputs(backend):
    values = images()
    leaves = [v.to(k).requires_grad_() for v, k in zip(values, (torch.bfloat16, torch.float16, torch.float32))]
    made = run(*leaves, new=ALPHA_BAR_NEW, copies=2, dtype=torch.float32, backend=backend)
    grads = torch.autograd.grad(made.sum(), leaves)
    s_u = (1 - ALPHA_BAR_NEW).sqrt().view(-1, 1, 1, 1).expand(SHAPE)
    assert made.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float16, torch.float32]
    assert_close(grads[2], 2 * s_u, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    values = images()[:3]
    expected = run(*values, new=ALPHA_BAR_NEW, backend=backend)
    whole = torch.full((6, 5, 16, 20), float("nan"))
    whole[::2, 1:, :, 3:] = values[0]
    layouts = [whole[::2, 1:, :, 3:], values[1].to(memory_format=torch.channels_last), values[2].mT.contiguous().mT]
    assert_close(run(*layouts, new=ALPHA_BAR_NEW, backend=backend), expected, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_around_a_tile_in_memory_full_of_nan(device, variant, dtype):
    """One element less and more than a tile, forward and backward; what lies around an image is never read."""
    library = library_on(device)
    for size in (1, 15, 16, 17, TILE - 1, TILE, TILE + 1):
        values = images(dtype, (3, 1, 1, size))[:3]
        around = torch.full((3, 3, 3, 1, size + 6), float("nan"), dtype=dtype, device=device)
        around[:, :, 1:2, :, 3:-3] = torch.stack(values).to(device)
        results = []
        for whole, backend in ((around[:, :, 1:2, :, 3:-3], library), (torch.stack(values), "reference")):
            leaves = [value.requires_grad_() for value in whole.unbind(0)]
            made = run(*leaves, **variant, backend=backend)
            upstream = torch.linspace(-1, 1, made.numel(), device=made.device).view_as(made).to(dtype)
            results.append([made, *torch.autograd.grad(made, leaves, upstream)])
        for mine, its in zip(*results):
            assert_close(mine, its, 2e-6, f"{size} elements")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_images(device, dtype):
    """A result of more than 4 MiB, which lies on large pages where the system has them."""
    values = images(dtype, (3, 4, 384, 384))[:3]
    made = run(*(value.to(device) for value in values), copies=3, backend=library_on(device))
    assert_close(made, run(*values, copies=3, backend="reference"), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [0.0, -0.0, 1e-7, 5.9e-8, 2.9e-8, 65504.0, 65520.0, 65519.9, 1e9, 3.4e38, 1e-40])
def test_rounding_to_sixteen_bits_is_pytorchs(backend, bad):
    """Subnormal, overflowing and tiny values, through the kernel's own conversions both ways."""
    value = torch.full((1, 1, 1, 4), bad) * torch.tensor([1.0, -1.0, 1.001, 0.999])
    zero, one = torch.zeros_like(value), torch.ones(1)
    for dtype in (torch.float16, torch.bfloat16):
        stored = PF.renoise(value, zero, zero, one, dtype=dtype, backend=backend)
        assert torch.equal(stored, value.to(dtype))
        finite = torch.where(stored.isfinite(), stored, 0)
        read = PF.renoise(finite, zero, zero, one, dtype=torch.float32, backend=backend)
        assert torch.equal(read, finite.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (3, 0, 2, 2), (3, 4, 2, 0)])
def test_empty_tensors(backend, shape):
    empty = torch.empty(shape, requires_grad=True)
    made = PF.renoise(empty, empty, empty, ALPHA_BAR[: shape[0]], copies=2, backend=backend)
    assert made.shape == (2 * shape[0], *shape[1:])
    made.sum().backward()
    assert empty.grad.shape == shape


@pytest.mark.parametrize("overload", ["default", "reference"])
@pytest.mark.parametrize("new", [None, ALPHA_BAR_NEW])
def test_opcheck(overload, new):
    x_t, eps, noise, _ = images(shape=(3, 2, 4, 5))
    op = getattr(torch.ops.palp_fast.renoise, overload)
    leaves = (x_t.requires_grad_(), eps.requires_grad_(), noise.requires_grad_())
    torch.library.opcheck(op, (*leaves, ALPHA_BAR, new, 2, torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend):
    values = images()

    def function(x_t, eps):
        return 2 * run(x_t, eps, values[2], new=ALPHA_BAR_NEW, copies=2, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [value.requires_grad_() for value in values[:2]]
    results = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, function)]
    for mine, its in zip(*results):
        assert_close(mine, its, 1e-7)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x_t": torch.ones(3, 4, 16)}, "x_t has shape"),
        ({"eps_pred": torch.ones(2, 4, 16, 17)}, "eps_pred has shape"),
        ({"noise": torch.ones(SHAPE, dtype=torch.int32)}, "noise has dtype"),
        ({"noise_new": torch.ones(1)}, "noise_new has shape"),
        ({"alpha_bar": None}, "alpha_bar"),
        ({"alpha_bar": torch.ones(2)}, "alpha_bar has shape"),
        ({"alpha_bar_new": torch.ones(3, 1)}, "alpha_bar_new has shape"),
        ({"alpha_bar": torch.tensor([0.5, 0.0, 1.0])}, r"alpha_bar has values from 0.0 to 1.0: allowed .* \(0, 1\]"),
        ({"alpha_bar_new": torch.tensor([0.5, 1.5, 1.0])}, "alpha_bar_new has values from 0.5 to 1.5"),
        ({"alpha_bar": torch.tensor([0.5, float("nan"), 1.0])}, "alpha_bar has values"),
        ({"copies": 0}, "copies=0"),
        ({"copies": 1.0}, "copies"),
        ({"dtype": torch.int32}, "dtype"),
        ({"backend": ""}, "backend"),
    ],
)
def test_bad_arguments_are_named(change, name):
    x_t, eps, noise, _ = images()
    arguments = {"x_t": x_t, "eps_pred": eps, "noise": noise, "alpha_bar": ALPHA_BAR, **change}
    with pytest.raises((ValueError, TypeError), match=name):
        PF.renoise(**arguments)
