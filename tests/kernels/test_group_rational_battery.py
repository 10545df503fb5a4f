"""The group-rational activation over random inputs, as an operator, and as a citizen of PyTorch's compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import core
from paperbench.kernels import group_rational as gr
from paperbench.kernels.core import interpreter, relative_error

BOUNDS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OPERATOR = torch.ops.paperbench.group_rational


def coefficients(groups, m, n, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(groups, k, generator=g).to(dtype) for k in (m + 1, n))


@needs_triton
@patient(10)
@given(
    rows=st.sampled_from([1, 2, 5, 17, 131]),
    width=st.sampled_from([1, 3, 7, 8, 16, 24]),
    groups=st.sampled_from([1, 2, 3]),
    degrees=st.sampled_from([(5, 4), (5, 4), (0, 1), (1, 3), (3, 1), (7, 7)]),
    dtype=st.sampled_from(list(BOUNDS)),
    own=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    layout=st.sampled_from(["plain", "transposed", "every other", "slice"]),
    seed=st.integers(0, 2**16),
)
def test_result_and_gradients_over_random_inputs(rows, width, groups, degrees, dtype, own, size, layout, seed):
    g = torch.Generator().manual_seed(seed)
    x = (size * torch.randn(rows, groups * width, generator=g)).to(dtype)
    x = torch.where(x.isfinite(), x, 1.0)  # float16 ends at 65504
    a, b = coefficients(groups, *degrees, dtype if own else torch.float32, seed)
    upstream = torch.randn(x.shape, generator=g).to(dtype)
    leaves = [t.detach().requires_grad_() for t in (laid_out(x, layout), a, b)]
    exact = [t.double().requires_grad_() for t in (x, a, b)]
    with interpreter():
        y = OPERATOR(*leaves)
        found = torch.autograd.grad(y, leaves, laid_out(upstream, layout))
    truth = gr.group_rational_reference(*exact)
    wanted = torch.autograd.grad(truth, exact, upstream.double())
    assert relative_error(y, truth.to(dtype)) < BOUNDS[dtype]
    # Gradients may cancel: rounding is relative to the sum of the sizes of what they are made of.
    scale = gradient_sizes(x.double(), a.double(), b.double(), upstream.double())
    smallest = 6e-8 if dtype == torch.float16 else 1e-37
    for f, w, bound in zip(found, wanted, scale):
        unit = BOUNDS[dtype] if f is found[0] or own else BOUNDS[torch.float32]
        assert ((f.double() - w).abs() <= 8 * unit * bound + smallest).all()


def gradient_sizes(x, a, b, g):
    """Sums of the sizes of all terms in the three gradients."""
    groups = len(a)
    x, g = (t.unflatten(-1, (groups, -1)) for t in (x, g.abs()))
    i, j = torch.arange(a.shape[1]), torch.arange(1, b.shape[1] + 1)
    up, down = x.abs().unsqueeze(-1) ** i, x.abs().unsqueeze(-1) ** j
    signed = (b.unsqueeze(1) * x.unsqueeze(-1) ** j).sum(-1)
    d = 1 + signed.abs()
    lost = 1 + (b.abs().unsqueeze(1) * down).sum(-1) / d  # digits that cancel within Q
    f = (a.abs().unsqueeze(1) * up).sum(-1) / d * lost
    steep = (b.abs().unsqueeze(1) * j * x.abs().unsqueeze(-1) ** (j - 1)).sum(-1)
    rise = (a.abs().unsqueeze(1) * i * x.abs().unsqueeze(-1) ** (i - 1).clamp(min=0)).sum(-1)
    to_x = g * lost * (rise + f * steep) / d
    to_a = (g / d * lost).unsqueeze(-1) * up
    to_b = (g * f / d * lost).unsqueeze(-1) * down
    return to_x.flatten(-2), to_a.sum((0, 2)), to_b.sum((0, 2))


@needs_triton
def test_empty_and_thin_inputs():
    with interpreter():
        for shape in ((0, 6), (4, 0), (0,), (2, 0, 6), (6,), (2, 1, 6)):
            leaves = [torch.randn(shape), *coefficients(2, 2, 1, torch.float32, 0)]
            leaves = [t.requires_grad_() for t in leaves]
            y = gr.group_rational(*leaves, impl="triton")
            torch.testing.assert_close(y, gr.group_rational(*leaves, impl="torch"))
            found = torch.autograd.grad(y.sum(), leaves)
            assert [f.shape for f in found] == [t.shape for t in leaves]
            if y.numel() == 0:
                assert not any(f.any() for f in found)


@needs_triton
def test_coefficient_gradients_of_large_inputs():
    # a bounded function, so that every gradient is finite
    a, b = torch.tensor([[1.0, 2, -1, 0, 3]]), torch.tensor([[0.5, -1, 0, 2]])
    x = torch.tensor([[1e4, -1e8, 1e20, -1e30, 3e38, 0.3, -2.0, 4096.0]])
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    exact = [t.double().requires_grad_() for t in (x, a, b)]
    upstream = torch.linspace(-1, 2, 8)[None]
    with interpreter():
        found = torch.autograd.grad(gr.group_rational(*leaves, impl="triton"), leaves, upstream)
    wanted = torch.autograd.grad(gr.group_rational_reference(*exact), exact, upstream.double())
    for f, w in zip(found, wanted):
        assert f.isfinite().all() and relative_error(f, w) < 2e-6
    leaves[1] = leaves[1].detach()
    naive = gr.group_rational_reference(x, a, b, compute=torch.float32)
    assert naive.isnan().any(), "what the second precision is for"


@needs_triton
def test_rows_that_are_slices_are_read_where_they_lie():
    x = torch.randn(5, 64)
    assert gr._readable(x[:, 16:48], 4).data_ptr() == x[:, 16:48].data_ptr()
    assert gr._readable(x[:, 1:33], 4).is_contiguous() and gr._readable(x.T, 1).is_contiguous()
    expanded = x[:1].expand(7, -1)
    a, b = coefficients(2, 5, 4, torch.float32, 1)
    with interpreter():
        torch.testing.assert_close(
            gr.group_rational(expanded, a, b, impl="triton"), gr.group_rational_reference(expanded, a, b)
        )


@needs_triton
def test_input_and_gradient_may_lie_differently():
    x, g = torch.randn(5, 64)[:, 16:48], torch.randn(5, 48)[:, 4:36]
    a, b = coefficients(2, 5, 4, torch.float32, 1)
    backward = torch.ops.paperbench.group_rational_backward
    assert gr._readable(x, 4).stride(0) == 64 and gr._readable(g, 4).stride(0) == 48
    with interpreter():
        for first, second in ((x, g), (x, g.contiguous()), (x.contiguous(), g)):
            found = backward(second, first, a, b)
            exact = [t.double().requires_grad_() for t in (x, a, b)]
            wanted = torch.autograd.grad(gr.group_rational_reference(*exact), exact, g.double())
            assert max(relative_error(f, w) for f, w in zip(found, wanted)) < 2e-5


@needs_triton
def test_opcheck():
    with interpreter():
        inputs = [torch.randn(2, 6), *coefficients(2, 2, 1, torch.float32, 2)]
        inputs = [t.requires_grad_() for t in inputs]
        result = torch.library.opcheck(OPERATOR.default, tuple(inputs))
        assert set(result.values()) == {"SUCCESS"} and len(result) >= 4
        plain = [t.detach() for t in inputs]
        backward = torch.ops.paperbench.group_rational_backward.default
        result = torch.library.opcheck(backward, (plain[0], *plain), test_utils=("test_schema", "test_faketensor"))
        assert set(result.values()) == {"SUCCESS"}


def test_gradcheck_of_the_reference():
    inputs = [torch.randn(3, 4, dtype=torch.float64), *coefficients(2, 5, 4, torch.float64, 3)]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(gr.group_rational_reference, inputs)
    assert torch.autograd.gradgradcheck(gr.group_rational_reference, inputs)
    shared = [inputs[0], inputs[1][:1].detach().requires_grad_(), inputs[2]]
    assert torch.autograd.gradcheck(gr.group_rational, shared)


def test_one_graph_through_the_reference():
    inputs = [torch.randn(3, 4), *coefficients(2, 5, 4, torch.float32, 4)]
    inputs = [t.requires_grad_() for t in inputs]
    compiled = torch.compile(gr.group_rational, fullgraph=True, backend="aot_eager")
    expected = gr.group_rational_reference(*inputs)
    torch.testing.assert_close(compiled(*inputs), expected)
    found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), inputs))


@needs_triton
def test_the_operator_does_not_break_the_graph():
    inputs = [torch.randn(2, 6), *coefficients(2, 2, 1, torch.float32, 5)]
    found, code = compiled_graph(lambda x, a, b: 2 * OPERATOR(x + 1, a, b), *inputs)
    assert "paperbench.group_rational" in code
    torch.testing.assert_close(found, 2 * gr.group_rational_reference(inputs[0] + 1, *inputs[1:]))


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles(target, compile_sample):
    def chosen(c):
        return c.dtype == torch.float16 and c.constants.get("CHUNK", 1) > 1

    compile_sample(gr.configurations((target,)), chosen, 2)


def test_benchmark_runs_on_a_cpu():
    found = gr.benchmark("cpu", shapes=((30, 16, 2), (5, 12, 12)), dtype=torch.float32, compiled=False, rounds=2)
    assert len(found["parity"]) == 2 and max(max(p.values()) for p in found["parity"].values()) < 1e-5
    timed = [row for row in found["rows"] if "skipped" not in row]
    assert len(found["rows"]) == 8 and len(timed) == 4
    assert all(row["forward"]["median"] > 0 and row["share of bandwidth with backward"] > 0 for row in timed)
