"""The selective scan over random inputs, as an operator, and as a citizen of PyTorch's compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import core
from paperbench.kernels import selective_scan as ss
from paperbench.kernels.core import interpreter, relative_error

OPERATOR = torch.ops.paperbench.selective_scan
BACKWARD = torch.ops.paperbench.selective_scan_backward
NAMES = ("x", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def tensors(batch, length, channels, states, vary=(True, True, True), dtype=torch.float32, size=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, channels)] * 2 + [(channels, states)] + [(batch, length, states)] * 2
    for place, varies in zip((1, 3, 4), vary):
        shapes[place] = shapes[place] if varies else (channels, states)[: 1 if place == 1 else 2]
    p = [size * torch.randn(shape, generator=g) for shape in shapes]
    p[1], p[2] = p[1] / size, -(p[2] / size).exp()
    p = [t.to(dtype) for t in p]
    return p + [torch.randn(channels, generator=g) for _ in range(2)] + [torch.randn(batch, channels, states, generator=g)]


def reference(x, delta, A, B, C, D, bias, start, softplus):
    options = dict(delta_bias=bias, delta_softplus=softplus, initial_state=start, return_state=True)
    return ss.selective_scan_reference(x, delta, A, B, C, D, **options)


def sizes_of_gradients(exact, upstream, softplus):
    """Gradients may cancel: rounding is relative to what they are sums of, with every term made positive."""
    x, raw, A, B, C, D, bias, start = (t.detach() for t in exact)
    step = ss._step_sizes(raw, bias, softplus).expand(x.shape)
    decaying, writing, rates = (t.clone().requires_grad_() for t in (step, step.abs(), A))
    x, B, C, D, start = (t.abs().requires_grad_() for t in (x, B, C, D, start))
    h, total = start, 0.0
    for t in range(x.shape[1]):
        b, c = (f[:, t, None] if f.ndim == 3 else f for f in (B, C))
        h = (decaying[:, t, :, None] * rates).exp() * h + (writing * x)[:, t, :, None] * b
        total = total + (((h * c).sum(-1) + D * x[:, t]) * upstream[0][:, t].abs()).sum()
    total = total + (h * upstream[1].abs()).sum()
    leaves = [x, decaying, writing, rates, B, C, D, start]
    d_x, d_decaying, d_writing, d_A, d_B, d_C, d_D, d_start = torch.autograd.grad(total, leaves)
    d_step = d_decaying.abs() + d_writing.abs()
    if softplus:
        d_step = d_step * (raw + bias).sigmoid()
    d_bias = d_step.sum((0, 1))
    return d_x, d_step if raw.ndim == 3 else d_bias, d_A.abs(), d_B, d_C, d_D, d_bias, d_start


@needs_triton
@patient(6)
@given(
    batch=st.sampled_from([1, 2]),
    length=st.sampled_from([1, 2, 5, 7]),
    channels=st.sampled_from([1, 3, 8]),
    states=st.sampled_from([1, 2, 7]),
    vary=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from(list(BOUNDS)),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    layout=st.sampled_from(LAYOUTS),
    chunk=st.sampled_from([2, 4]),
    segments=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_result_and_gradients_over_random_inputs(
    batch, length, channels, states, vary, dtype, size, layout, chunk, segments, seed
):
    softplus = vary[0]
    p = tensors(batch, length, channels, states, vary, dtype, size, seed)
    if not softplus:
        p[1], p[6] = p[1].float().abs(), torch.zeros(channels)  # fixed steps have no bias in the operator
    leaves = [(laid_out(t, layout) if t.ndim == 3 and t.dtype == dtype else t).detach().requires_grad_() for t in p]
    exact = [t.detach().double().requires_grad_() for t in p]
    g = torch.Generator().manual_seed(seed)
    upstream = torch.randn(p[0].shape, generator=g).to(dtype), torch.randn(p[7].shape, generator=g)
    with interpreter():
        y, end, _ = OPERATOR(*leaves, softplus, chunk, segments)
        found = torch.autograd.grad((y, end), leaves, (laid_out(upstream[0], layout), upstream[1]))
    truth = reference(*exact, softplus)
    wide = [u.double() for u in upstream]
    wanted = torch.autograd.grad(truth, exact, wide)
    assert relative_error(y, truth[0]) < 4 * BOUNDS[dtype] and relative_error(end, truth[1]) < 4 * BOUNDS[torch.float32]
    for name, f, w, scale in zip(NAMES, found, wanted, sizes_of_gradients(exact, wide, softplus)):
        if name == "delta_bias" and not softplus:
            assert not f.any()
            continue
        unit = 8 * BOUNDS[torch.float32] * scale + BOUNDS[f.dtype] * w.abs() + (6e-8 if f.dtype == torch.float16 else 1e-37)
        assert ((f.double() - w).abs() <= unit).all(), name


@needs_triton
def test_empty_and_thin_inputs():
    with interpreter():
        for batch, length, channels in ((0, 3, 2), (2, 0, 2), (2, 3, 0), (1, 1, 1)):
            leaves = [t.requires_grad_() for t in tensors(batch, length, channels, 2)]
            y, end, _ = OPERATOR(*leaves, True, 0, 0)
            truth = reference(*leaves, True)
            torch.testing.assert_close((y, end), truth)
            found = torch.autograd.grad(y.sum() + end.square().sum(), leaves)
            wanted = torch.autograd.grad(truth[0].sum() + truth[1].square().sum(), leaves, allow_unused=True)
            wanted = [torch.zeros_like(t) if w is None else w for t, w in zip(leaves, wanted)]
            torch.testing.assert_close(list(found), wanted, rtol=1e-4, atol=1e-5)


@needs_triton
def test_more_dimensions_and_defaults():
    p = [t.unflatten(0, (2, 1, 1)) if t.ndim == 3 else t for t in tensors(2, 3, 2, 2)]
    with interpreter():
        found = ss.selective_scan(*p[:5], delta_softplus=True, return_state=True, impl="triton")
    torch.testing.assert_close(found, ss.selective_scan(*p[:5], delta_softplus=True, return_state=True))
    assert found[0].shape == p[0].shape and found[1].shape == p[7].shape


@needs_triton
def test_only_one_result_may_be_used():
    leaves = [t.requires_grad_() for t in tensors(1, 3, 2, 2)]
    with interpreter():
        y, end, _ = OPERATOR(*leaves, True, 2, 2)
        found = [torch.autograd.grad(r.sum(), leaves[:5], retain_graph=True) for r in (y, end)]
    truth = reference(*leaves, True)
    for i, f in enumerate(found):
        wanted = torch.autograd.grad(truth[i].sum(), leaves[:5], retain_graph=True, allow_unused=True)
        for a, b in zip(f, wanted):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


@needs_triton
def test_the_same_bits_every_time():
    leaves = [t.requires_grad_() for t in tensors(1, 5, 18, 16)]
    runs = []
    with interpreter():
        for _ in range(2):
            y, end, _ = OPERATOR(*leaves, True, 4, 1)
            runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    truth = reference(*leaves, True)[0]
    wanted = (truth, *torch.autograd.grad(truth.square().sum(), leaves))
    assert max(relative_error(f, w) for f, w in zip(runs[0], wanted)) < 1e-5


def test_segments_are_cut_only_where_the_card_would_idle():
    assert ss.choose_segments(768, 32, 132) == 1, "eight sequences of 1536 channels on an H100"
    assert ss.choose_segments(96, 1024, 132) == 11 and 96 * 11 >= 8 * 132
    assert ss.choose_segments(1, 5, 132) == 5 and ss.choose_segments(0, 5, 1) == 5
    for length, segments in ((1000, 0), (64 * 7, 5), (1, 3), (64 * 9, 4)):
        x = torch.empty(1, length, 1)
        p = ss._plan(x, x, x, x, 1, True, 0, segments)
        assert (p.segments - 1) * p.per < p.chunks <= p.segments * p.per, "no segment is empty, none is missing"


@needs_triton
def test_opcheck():
    with interpreter():
        p = tensors(1, 2, 2, 2)
        leaves = [t.requires_grad_() for t in p]
        result = torch.library.opcheck(OPERATOR.default, (*leaves, True, 2, 1))
        assert set(result.values()) == {"SUCCESS"} and len(result) >= 4
        plain = [t.detach() for t in p]
        y, end, edges = OPERATOR(*plain, True, 2, 1)
        arguments = (y, end, *plain[:7], edges, True, 2, 1)
        result = torch.library.opcheck(BACKWARD.default, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("varies", [True, False])
def test_gradcheck_of_the_reference(varies):
    leaves = [t.double().requires_grad_() for t in tensors(1, 3, 2, 2, (varies,) * 3)]
    assert torch.autograd.gradcheck(lambda *p: reference(*p, True), leaves)
    assert torch.autograd.gradgradcheck(lambda *p: reference(*p, True)[0], leaves)


def test_one_graph_through_the_reference():
    leaves = [t.requires_grad_() for t in tensors(1, 3, 2, 2)]

    def layer(x, delta, A, B, C, D, bias, start):
        return ss.selective_scan(x, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, initial_state=start)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = layer(*leaves), compiled(*leaves)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


@needs_triton
def test_the_operator_does_not_break_the_graph():
    p = tensors(1, 2, 2, 2)
    found, code = compiled_graph(lambda *p: 2 * OPERATOR(p[0] + 1, *p[1:], True, 0, 0)[0], *p)
    assert "paperbench.selective_scan" in code
    torch.testing.assert_close(found, 2 * reference(p[0] + 1, *p[1:], True)[0])


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles(target, compile_sample):
    def chosen(c):
        of_kind = c.dtype == torch.float16 and c.labels["mode"] == "fixed"
        return of_kind and (c.kernel is ss.pull_kernel or c.labels["role"] == "local")

    compile_sample(ss.configurations((target,)), chosen, 2)


def test_benchmark_runs_on_a_cpu():
    found = ss.benchmark("cpu", shapes=((2, 5, 33, 2),), dtype=torch.float32, compiled=False, rounds=2)
    (parity,) = found["parity"].values()
    assert len(parity) == 8 and max(parity.values()) < 1e-5
    timed = [row for row in found["rows"] if "skipped" not in row]
    assert len(found["rows"]) == 5 and len(timed) == 3
    assert all(row["forward"]["median"] > 0 and row["share of bandwidth with backward"] > 0 for row in timed)


def test_doubling_is_the_same_scan():
    x, delta, A, B, C, D, bias, start = tensors(2, 11, 3, 2)
    wanted = reference(x, delta, A, B, C, D, bias, torch.zeros_like(start), True)[0]
    torch.testing.assert_close(ss.doubling_scan(x, delta, A, B, C, D, bias), wanted, rtol=1e-4, atol=1e-5)
