"""The sum layer of probabilistic circuits over random inputs, as an operator, and as a citizen of PyTorch's compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import core
from paperbench.kernels import log_einsum_exp as lee
from paperbench.kernels.core import interpreter

BOUNDS = {torch.float32: 4e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OPERATOR = torch.ops.paperbench.log_einsum_exp
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of NumPy, about infinities


def brute_force(x, log_weights, other, upstream):
    """Values and gradients in float64, from the posterior use of every edge, without any function of the module."""
    z = x.double()[..., None] if other is None else x.double()[..., None] + other.double()[..., None, :]
    w = log_weights.double()[..., None] if other is None else log_weights.double()
    terms = z[:, :, None] + w
    y = torch.logsumexp(terms, (-2, -1))
    shift = torch.where(y.isfinite(), y, 0.0)[..., None, None]
    uses = torch.where(y.isfinite()[..., None, None], (terms - shift).exp(), 0.0)
    weighted = upstream.double()[..., None, None] * uses
    gradients = [weighted.sum((2, 4)), weighted.sum(0), weighted.sum((2, 3))]
    sizes = [weighted.abs().sum((2, 4)), weighted.abs().sum(0), weighted.abs().sum((2, 3))]
    if other is None:
        gradients, sizes = ([g[0], g[1][..., 0]] for g in (gradients, sizes))
    return y, gradients, sizes


@needs_triton
@patient(5)
@given(
    batch=st.sampled_from([1, 2, 5, 33]),
    nodes=st.sampled_from([1, 2]),
    outs=st.sampled_from([1, 3, 16, 33]),
    states=st.sampled_from([(1,), (2,), (17,), (67,), (2, 5), (3, 1), (1, 33)]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
    own=st.booleans(),
    spread=st.sampled_from([1e-3, 1.0, 1.0, 80.0]),
    level=st.sampled_from([0.0, -3000.0]),
    pruned=st.sampled_from([0.0, 0.0, 0.7]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
def test_result_and_gradients_over_random_inputs(
    batch, nodes, outs, states, dtype, own, spread, level, pruned, layout, seed
):
    g = torch.Generator().manual_seed(seed)
    if spread > 1 and pruned:  # most sums are formed again, row by row, which is slow here
        batch, nodes = min(batch, 5), 1
    x, *other = ((spread * torch.randn(batch, nodes, s, generator=g) + level).to(dtype) for s in states)
    log_weights = torch.randn(nodes, outs, *states, generator=g)
    log_weights[torch.rand(log_weights.shape, generator=g) < pruned] = -torch.inf
    x[0, 0] = -torch.inf
    log_weights = log_weights.to(dtype) if own else log_weights
    upstream = torch.randn(batch, nodes, outs, generator=g).to(dtype)
    inputs = [laid_out(x, layout), log_weights, *(laid_out(o, layout) for o in other)]
    leaves = [t.detach().requires_grad_() for t in inputs]
    with interpreter():
        y = lee.log_einsum_exp(*leaves, impl="triton")
        found = torch.autograd.grad(y, leaves, laid_out(upstream, layout))
    truth, wanted, sizes = brute_force(x, log_weights, other[0] if other else None, upstream)
    assert torch.equal(y.isinf(), truth.isinf())
    peaks = x.double().amax(-1, keepdim=True).abs() + sum(o.double().amax(-1, keepdim=True).abs() for o in other)
    scale = torch.where(truth.isfinite() & peaks.isfinite(), truth.abs() + peaks + 10, 1.0)
    error = torch.where(truth.isfinite(), (y.double() - truth).abs(), 0.0)
    assert (error <= BOUNDS[dtype] * scale).all()
    # Terms may cancel: rounding is relative to their sizes. Logarithms of second looks carry errors of their own size.
    logs = 6e-8 * 8 * (10 + spread * 10)
    largest = upstream.double().abs().sum()
    for f, w, size, leaf in zip(found, wanted, sizes, leaves):
        unit = max(BOUNDS[leaf.dtype], 4e-6) + logs
        assert f.isfinite().all() and f.dtype == leaf.dtype
        assert ((f.double() - w).abs() <= unit * size + 1e-7 * largest).all()


@needs_triton
def test_empty_and_batched_inputs():
    log_weights = torch.randn(2, 3, 4, requires_grad=True)
    with interpreter():
        for lead in ((0,), (2, 0), (), (2, 2)):
            x = torch.randn(*lead, 2, 4, requires_grad=True)
            y = lee.log_einsum_exp(x, log_weights, impl="triton")
            assert y.shape == (*lead, 2, 3)
            torch.testing.assert_close(y, lee.log_einsum_exp(x, log_weights, impl="torch"))
            d_x, flows = torch.autograd.grad(y.sum(), (x, log_weights))
            assert d_x.shape == x.shape and torch.allclose(flows.sum(-1), torch.tensor(x.numel() / 8.0))
        none = lee.log_einsum_exp(torch.randn(5, 0, 4), torch.randn(0, 3, 4), impl="triton")
        assert none.shape == (5, 0, 3)


@needs_triton
def test_one_argument_at_a_time_and_no_gradient_at_all():
    inputs = [torch.randn(3, 1, 4), torch.randn(1, 2, 4, 2), torch.randn(3, 1, 2)]
    with interpreter():
        for which in range(3):
            leaves = [t.clone().requires_grad_(i == which) for i, t in enumerate(inputs)]
            (found,) = torch.autograd.grad(lee.log_einsum_exp(*leaves, impl="triton").sum(), leaves[which])
            (wanted,) = torch.autograd.grad(lee.log_einsum_exp_reference(*leaves).sum(), leaves[which])
            torch.testing.assert_close(found, wanted)
        assert not lee.log_einsum_exp(*inputs, impl="triton").requires_grad
        # an operator that was told to keep nothing must still find its way back
        x, log_weights = torch.randn(3, 1, 4, requires_grad=True), torch.randn(1, 2, 1, 4)
        y = OPERATOR(None, x, log_weights, False)[0][..., :2]
        (found,) = torch.autograd.grad(y.sum(), x)
        wanted = torch.autograd.grad(lee.log_einsum_exp_reference(x, log_weights[:, :, 0]).sum(), x)[0]
        torch.testing.assert_close(found, wanted)


@needs_triton
def test_every_node_meets_its_own_weights():
    x, log_weights = torch.randn(65, 9, 1), torch.randn(9, 1, 1)  # eight nodes side by side, then one, in two tiles
    with interpreter():
        torch.testing.assert_close(lee.log_einsum_exp(x, log_weights, impl="triton"), x + log_weights[..., 0])


@needs_triton
def test_several_programs_share_the_rows_and_the_bits_are_the_same_every_time():
    x, log_weights, g = torch.randn(70, 1, 3), torch.randn(1, 2, 1, 3), torch.rand(70, 1, 16)
    g[..., 2:] = 0
    assert lee.choose_parts(1, 3, 1) == 3, "three tiles of rows, three programs"
    with interpreter():
        _, sums, peaks = OPERATOR(None, x, log_weights, True)
        twice = [torch.ops.paperbench.log_einsum_exp_backward(g, None, x, log_weights, sums, peaks) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*twice))
    _, wanted, _ = brute_force(x, log_weights[:, :, 0], None, g[..., :2])
    torch.testing.assert_close(twice[0][2][:, :, 0].double(), wanted[1], rtol=1e-5, atol=1e-6)


@needs_triton
def test_rows_too_far_apart_are_refused():
    with interpreter(), pytest.raises(ValueError, match="split the nodes"):
        OPERATOR(None, torch.zeros(2, 2**20, 1), torch.zeros(2**20, 1, 1, 1), False)


@needs_triton
def test_opcheck():
    with interpreter():
        left, right = torch.randn(3, 1, 2, requires_grad=True), torch.randn(3, 1, 4, requires_grad=True)
        single, pair = torch.randn(1, 2, 1, 4, requires_grad=True), torch.randn(1, 2, 2, 4, requires_grad=True)
        result = torch.library.opcheck(OPERATOR.default, (None, right, single, True))
        assert set(result.values()) == {"SUCCESS"} and len(result) >= 4
        result = torch.library.opcheck(
            OPERATOR.default, (left, right, pair, True), test_utils=("test_schema", "test_faketensor")
        )
        assert set(result.values()) == {"SUCCESS"}
        plain = [t.detach() for t in (left, right, pair)]
        y, sums, peaks = OPERATOR(*plain, True)
        backward = torch.ops.paperbench.log_einsum_exp_backward.default
        result = torch.library.opcheck(
            backward, (torch.ones_like(y), *plain, sums, peaks), test_utils=("test_schema", "test_faketensor")
        )
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("fn", [lee.log_einsum_exp_reference, lee.log_einsum_exp])
def test_gradcheck_on_a_cpu(fn):
    g = torch.Generator().manual_seed(1)
    x, other = (torch.randn(2, 2, s, dtype=torch.float64, generator=g, requires_grad=True) for s in (3, 2))
    log_weights = torch.randn(2, 2, 3, 2, dtype=torch.float64, generator=g, requires_grad=True)
    assert torch.autograd.gradcheck(fn, (x, log_weights, other))
    assert torch.autograd.gradgradcheck(fn, (x, log_weights, other))
    far = (x.detach() * 2000).requires_grad_()  # sums that are formed again
    assert torch.autograd.gradcheck(fn, (far, log_weights.detach()[..., 0]), atol=1e-4)


def test_one_graph_through_the_reference():
    inputs = [torch.randn(3, 2, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)]
    compiled = torch.compile(lambda *a: lee.log_einsum_exp(*a), fullgraph=True, backend="aot_eager")
    expected = lee.log_einsum_exp(*inputs)
    torch.testing.assert_close(compiled(*inputs), expected)
    found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), inputs))


@needs_triton
def test_the_operator_does_not_break_the_graph():
    x, log_weights = torch.randn(2, 1, 4), torch.randn(1, 3, 1, 4)
    found, code = compiled_graph(lambda x, w: OPERATOR(None, 2 * x, w, False)[0][..., :3] + 1, x, log_weights)
    assert "paperbench.log_einsum_exp" in code
    torch.testing.assert_close(found, lee.log_einsum_exp_reference(2 * x, log_weights[:, :, 0]) + 1)


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles(target, compile_sample):
    kernels = (lee.prepare_kernel, lee.forward_kernel) if target == "sm_90" else (lee.prepare_kernel,)

    def chosen(c):
        return c.constants["TILE"] == 32 and c.kernel in kernels

    compile_sample(lee.configurations((target,)), chosen, 1)


def test_benchmark_runs_on_a_cpu():
    found = lee.benchmark("cpu", shapes=((20, 2, 3, 4), (5, 1, 2, 3, 2)), compiled=False, rounds=2, peak_size=32)
    assert len(found["parity"]) == 2 and max(max(p.values()) for p in found["parity"].values()) < 1e-6
    timed = [row for row in found["rows"] if "skipped" not in row]
    assert len(found["rows"]) == len(timed) == 4
    assert all(row["forward"]["median"] > 0 and row["share of bandwidth, forward and backward"] > 0 for row in timed)
