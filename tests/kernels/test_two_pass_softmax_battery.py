"""Two-pass softmax over random inputs, as an operator, and as a citizen of PyTorch's compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import core
from paperbench.kernels import two_pass_softmax as tp
from paperbench.kernels.core import interpreter, relative_error

BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OPERATOR = torch.ops.paperbench.two_pass_softmax


@needs_triton
@patient(14)
@given(
    rows=st.sampled_from([1, 2, 5, 17]),
    cols=st.sampled_from([1, 2, 31, 128, 129, 257, 521, 1024]),
    dtype=st.sampled_from(list(BOUNDS)),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    masked=st.booleans(),
    layout=st.sampled_from(["plain", "transposed", "every other", "slice"]),
    seed=st.integers(0, 2**16),
)
def test_result_and_gradient_over_random_inputs(rows, cols, dtype, size, masked, layout, seed):
    g = torch.Generator().manual_seed(seed)
    x = (size * torch.randn(rows, cols, generator=g)).to(dtype)
    if masked and cols > 1:
        x[:, ::3] = -torch.inf
    upstream = torch.randn(rows, cols, generator=g).to(dtype)
    leaf, exact = laid_out(x, layout).detach().requires_grad_(), x.double().requires_grad_()
    with interpreter():
        y = OPERATOR(leaf, 128)
        (found,) = torch.autograd.grad(y, leaf, laid_out(upstream, layout))
    truth = exact.softmax(-1)
    (wanted,) = torch.autograd.grad(truth, exact, upstream.double())
    assert relative_error(y, truth) < BOUNDS[dtype]
    # the gradient is a difference of two parts that may cancel: rounding is relative to the parts
    parts = (truth * upstream.double()).norm().item()
    assert (found.double() - wanted).norm().item() <= 4 * BOUNDS[dtype] * parts + 1e-30


@needs_triton
def test_empty_and_thin_inputs():
    with interpreter():
        for shape in ((0, 5), (4, 0), (0,), (2, 0, 3)):
            x = torch.randn(shape, requires_grad=True)
            y = tp.two_pass_softmax(x, impl="triton")
            assert y.shape == shape
            (d,) = torch.autograd.grad(y.sum(), x)
            assert d.shape == shape
        for dim in (0, 1, -2):
            x = torch.randn(3, 4, 5)
            torch.testing.assert_close(tp.two_pass_softmax(x, dim, impl="triton"), x.softmax(dim))


@needs_triton
def test_spans_of_a_row_and_one_walk_agree():
    x = 20 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    assert tp.choose_plan(1, 5000, 2, 128).spans > 1 and tp.choose_plan(9, 5000, 1, 128).spans == 1
    with interpreter():
        cut, whole = OPERATOR(x, 128), OPERATOR(x.expand(9, -1), 128)
    torch.testing.assert_close(cut[0], whole[4], rtol=1e-5, atol=1e-9)


@needs_triton
def test_opcheck():
    with interpreter():
        x = torch.randn(2, 5, requires_grad=True)
        result = torch.library.opcheck(OPERATOR.default, (x, 128))
        assert set(result.values()) == {"SUCCESS"} and len(result) >= 4
        y = x.detach().softmax(-1)
        backward = torch.ops.paperbench.two_pass_softmax_backward.default
        result = torch.library.opcheck(backward, (y, y, 128), test_utils=("test_schema", "test_faketensor"))
        assert set(result.values()) == {"SUCCESS"}


def test_gradcheck_of_the_reference():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tp.two_pass_softmax_reference, (x,))
    assert torch.autograd.gradgradcheck(tp.two_pass_softmax_reference, (x,))
    assert torch.autograd.gradcheck(lambda x: tp.two_pass_softmax(x, 0), (x,))


def test_one_graph_through_the_reference():
    x = torch.randn(3, 7, requires_grad=True)
    compiled = torch.compile(lambda x: tp.two_pass_softmax(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x.softmax(-1))
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(x.softmax(-1).square().sum(), x)
    torch.testing.assert_close(found, wanted)


@needs_triton
def test_the_operator_does_not_break_the_graph():
    x = torch.randn(2, 6, requires_grad=True)
    found, code = compiled_graph(lambda x: 2 * OPERATOR(x + 1, 128), x)
    assert "paperbench.two_pass_softmax" in code
    torch.testing.assert_close(found, 2 * (x + 1).softmax(-1))


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles(target, compile_sample):
    def chosen(c):
        of_kind = c.labels["wide"] and c.dtype == torch.float16
        return of_kind and (c.constants.get("SPANS") or c.labels["block"] == 16384)

    compile_sample(tp.configurations((target,)), chosen, 3)


def test_benchmark_runs_on_a_cpu():
    found = tp.benchmark("cpu", shapes=((3, 20), (2, 50)), dtype=torch.float32, compiled=False, rounds=2)
    assert len(found["parity"]) == 2 and max(max(p.values()) for p in found["parity"].values()) < 1e-5
    timed = [row for row in found["rows"] if "skipped" not in row]
    assert len(found["rows"]) == 6 and len(timed) == 4
    assert all(row["forward"]["median"] > 0 and row["share of bandwidth"] > 0 for row in timed)
