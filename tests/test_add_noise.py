"""add_noise: a function of (seed, step, sample, element) alone; gradients, dtypes, strides, errors, every backend."""

import math

import pytest
import torch
from close import BACKENDS, NEEDS_CUDA, NEEDS_LIBRARY, assert_close

from palp_fast import functional as PF

ALPHAS = torch.linspace(0.99, 0.01, 50)
T = torch.tensor([3, 49, 0])
SHAPE = (3, 4, 16, 17)  # 1088 elements an image: one tile of the C++ kernel and a rest
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# PyTorch's square root may be off by a unit in the last place, which now and then rounds a result the other way.
ROOT_ERROR = {torch.float32: 1e-7, torch.float64: 2e-16, torch.bfloat16: 1e-4, torch.float16: 2e-5}
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def latents(dtype=torch.float32, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(x0=None, t=T, alphas=ALPHAS, **keys):
    return PF.add_noise(latents() if x0 is None else x0, t, alphas, **{"seed": 5, "step": 2, **keys})


def root(values):
    """The nearest square root."""
    exact = [math.sqrt(value) for value in values.double().flatten().tolist()]
    return torch.tensor(exact, dtype=torch.float64).to(values.dtype).view(values.shape)


def noise(*args, **keys):
    return run(*args, **keys)[1]


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16, torch.float64])
def test_x_t_is_made_of_the_noise_as_returned(backend, dtype, table):
    x0, alphas = latents(dtype), ALPHAS.to(table)
    x_t, made = run(x0, alphas=alphas, backend=backend)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    alpha_bar = alphas.to(compute)[T].view(-1, 1, 1, 1)
    expected = root(alpha_bar) * x0.to(compute) + root(1 - alpha_bar) * made.to(compute)
    assert x_t.dtype == made.dtype == dtype and x_t.is_contiguous() and made.is_contiguous()
    assert_close(x_t, expected.to(dtype), 0 if backend == "cpu" else ROOT_ERROR[dtype])


# Around a tile of 1024, and images whose last four elements are not all there.
@NEEDS_LIBRARY
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1023, 1024, 1025, 2049])
def test_sizes(size):
    x0 = latents(shape=(2, 1, 1, size))
    for mine, its in zip(run(x0, T[:2], backend="cpu"), run(x0, T[:2], backend="reference")):
        assert mine.shape == x0.shape
        # The two differ in the rounding of logarithm and cosine.
        assert (mine - its).abs().max() < 2e-6


@EACH_BACKEND
def test_split_and_order_do_not_matter(backend):
    whole = noise(backend=backend)
    for index in range(3):
        part = noise(latents()[index : index + 1], T[:1], sample_offset=index, backend=backend)
        assert torch.equal(part[0], whole[index])


@EACH_BACKEND
def test_strides_and_dtype_do_not_matter(backend):
    x_t, made = run(backend=backend)
    wide = torch.zeros(6, 4, 16, 34)
    wide[::2, :, :, ::2] = latents()
    for x0 in (latents().to(memory_format=torch.channels_last), wide[::2, :, :, ::2]):
        strided = run(x0, backend=backend)
        assert torch.equal(strided[0], x_t) and torch.equal(strided[1], made)
    assert torch.equal(noise(latents(torch.bfloat16), backend=backend), made.to(torch.bfloat16))
    assert torch.equal(noise(latents(torch.float64), backend=backend), made.double())
    scattered = torch.stack([T, T], dim=1)[:, 0], torch.stack([ALPHAS, ALPHAS], dim=1)[:, 1]
    assert torch.equal(run(None, *scattered, backend=backend)[0], x_t)


@NEEDS_LIBRARY
def test_threads_do_not_matter():
    x0, t = latents(shape=(4, 4, 64, 64)), torch.tensor([1, 2, 3, 4])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(x0, t, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(results[0], other))


@EACH_BACKEND
def test_odd_sizes_are_prefixes(backend):
    made = noise(backend=backend).flatten(1)
    assert torch.equal(noise(latents()[:, :1, :1], backend=backend).flatten(1), made[:, :17])


@EACH_BACKEND
def test_ints_and_scalar_tensors_agree(backend):
    keys = {"seed": -3, "step": 2**31 + 1, "sample_offset": 11}
    scalars = {name: torch.tensor(value) for name, value in keys.items()}
    assert torch.equal(noise(**keys, backend=backend), noise(**scalars, backend=backend))


@EACH_BACKEND
def test_gradient(backend):
    x0 = latents(torch.float64, (3, 2, 3, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x0: run(x0, backend=backend), (x0,))


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_a_t_times_that_of_x_t(backend, dtype):
    x0 = latents(dtype).requires_grad_()
    grad = latents(dtype).flip(0).to(memory_format=torch.channels_last)
    run(x0, backend=backend)[0].backward(grad)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    a_t = root(ALPHAS.to(compute)[T]).view(-1, 1, 1, 1)
    assert_close(x0.grad, (a_t * grad.to(compute)).to(dtype), 0 if backend == "cpu" else ROOT_ERROR[dtype])


@pytest.mark.parametrize("kind", ["default", "reference"])
def test_opcheck(kind):
    scalars = [torch.tensor(value) for value in (1, 2, 3)]
    op = torch.ops.palp_fast
    torch.library.opcheck(getattr(op.add_noise, kind), (latents().requires_grad_(), T, ALPHAS, *scalars, 0))
    torch.library.opcheck(getattr(op.add_noise_bwd, kind), (latents(), T, ALPHAS))


@EACH_BACKEND
def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()  # it counts compilations of one function over all tests
    def function(x0, step):
        return run(x0, step=step, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for step in (0, 1, torch.tensor(2)):
        for mine, its in zip(compiled(latents(), step), function(latents(), step)):
            assert torch.equal(mine, its)


@EACH_BACKEND
@pytest.mark.parametrize("shape", [(0, 4, 5, 7), (3, 0, 5, 7), (3, 4, 5, 0)])
def test_empty_tensors(backend, shape):
    x0 = torch.empty(shape, requires_grad=True)
    x_t, made = run(x0, T[: shape[0]], backend=backend)
    assert x_t.shape == made.shape == shape
    x_t.sum().backward()
    assert x0.grad.shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.ones(3, 4, 5)}, r"x0 has shape \[3, 4, 5\]: allowed is \[B, C, H, W\]"),
        ({"x0": torch.ones(3, 4, 5, 7, dtype=torch.int64)}, "x0 has dtype torch.int64"),
        ({"t": torch.tensor([1, 2])}, r"t has shape \[2\]: allowed is \[3\]"),
        ({"t": torch.tensor([1.0, 2.0, 3.0])}, "t: torch.float32 given, allowed is an int64"),
        ({"t": torch.tensor([1, 50, 3])}, "t has values from 1 to 50: allowed are 0 to 49"),
        ({"t": torch.tensor([1, -1, 3])}, "t has values from -1 to 3: allowed are 0 to 49"),
        ({"t": T.to("meta")}, "t is on meta: allowed is cpu"),
        ({"alphas": torch.ones(2, 2)}, r"alphas_cumprod has shape \[2, 2\]: allowed is \[T\]"),
        ({"alphas": torch.ones(0)}, r"alphas_cumprod has shape \[0\]"),
        ({"alphas": torch.tensor([0.5, 0.0])}, r"alphas_cumprod has values from 0.0 to 0.5.*\(0, 1\]"),
        ({"alphas": torch.tensor([0.5, 1.5])}, r"alphas_cumprod has values from 0.5 to 1.5.*\(0, 1\]"),
        ({"alphas": torch.tensor([0.5, float("nan")])}, r"alphas_cumprod has values from nan.*\(0, 1\]"),
        ({"alphas": torch.ones(50, dtype=torch.int32)}, "alphas_cumprod has dtype torch.int32"),
        ({"alphas": ALPHAS.to("meta")}, "alphas_cumprod is on meta"),
        ({"seed": 0.5}, "seed=0.5: allowed is an int"),
        ({"step": 2**63}, f"step={2**63}: allowed is a 64-bit int"),
        ({"step": torch.tensor([1])}, r"step is torch.int64 of shape \[1\]"),
        ({"sample_offset": torch.tensor(1.0)}, "sample_offset is torch.float32"),
        ({"stream": -1}, "stream=-1: allowed is an int from 0 to 4294967295"),
        ({"stream": 2**32}, "stream=4294967296: allowed is an int from 0 to 4294967295"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(**change)


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, torch.tensor([1, 50, 3]), r"t\[1\]=50: allowed are 0 to 49"),
        (1, torch.tensor([1, 2, -9]), r"t\[2\]=-9: allowed are 0 to 49"),
        (1, torch.tensor([1, 2]), "t: allowed is an int64 vector of 3"),
        (2, torch.ones(2, 2), "alphas_cumprod: allowed is"),
        (4, torch.tensor([1]), "step: allowed is a 0-d int64 tensor"),
        (6, -1, "stream=-1"),
    ],
)
def test_the_library_itself_reads_nothing_outside(position, value, message):
    """The bare operator, as a compiled graph calls it: there values are first known here."""
    arguments = [latents(), T, ALPHAS, *(torch.tensor(value) for value in (1, 2, 3)), 0]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.palp_fast.add_noise.default(*arguments)


@NEEDS_CUDA
class TestCuda:
    keys = {"backend": "cuda"}

    def test_equals_the_cpu(self):
        for dtype in DTYPES:
            x0 = latents(dtype)
            for mine, its in zip(run(x0.cuda(), T.cuda(), ALPHAS.cuda(), **self.keys), run(x0, backend="cpu")):
                assert_close(mine.cpu(), its, {torch.bfloat16: 1e-4, torch.float16: 1e-5}.get(dtype, 1e-6))

    def test_gradient(self):
        x0 = latents(torch.float64, (3, 2, 3, 3)).cuda().requires_grad_()
        function = lambda x0: run(x0, T.cuda(), ALPHAS.cuda(), **self.keys)  # noqa: E731
        assert torch.autograd.gradcheck(function, (x0,))

    def test_outside_of_the_schedule_is_not_a_number(self):
        x_t, made = run(latents().cuda(), torch.tensor([3, 50, -1]).cuda(), ALPHAS.cuda(), **self.keys)
        assert x_t[1:].isnan().all() and x_t[0].isfinite().all() and made.isfinite().all()

    def test_a_replayed_graph_draws_anew(self):
        x0, t, alphas = latents().cuda(), T.cuda(), ALPHAS.cuda()
        step = torch.zeros((), dtype=torch.int64, device="cuda")
        run(x0, t, alphas, step=step, **self.keys)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = noise(x0, t, alphas, step=step, **self.keys)
            step += 1
        for k in range(3):
            graph.replay()
            assert torch.equal(made, noise(x0, t, alphas, step=k, **self.keys))
