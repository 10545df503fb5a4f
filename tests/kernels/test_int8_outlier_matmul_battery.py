"""Products in eight bits over random inputs, as operators, and as citizens of PyTorch's compiler."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import core
from paperbench.kernels import int8_outlier_matmul as i8
from paperbench.kernels.core import interpreter, relative_error

UNITS = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
OPERATOR = torch.ops.paperbench.int8_outlier_matmul


def brute_force(x, weight, scales, bias, exact, threshold, bits):
    """Result, sum of its addends' magnitudes, weights in use, levels and steps, by sums of single outer products."""
    single = x.float()
    apart = [not bool((column.abs() <= threshold).all()) for column in single.T]
    ordinary = single.clone()
    ordinary[:, apart] = 0
    steps = torch.stack([row.abs().max() / (2 ** (bits - 1) - 1) for row in ordinary]).clamp_min(2.0**-126)
    levels = (ordinary / steps[:, None]).round().long()
    used = weight.double() * scales.double()[:, None]
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int64)
    other, size = torch.zeros(2, *total.shape, dtype=torch.float64)
    for k, out in enumerate(apart):
        if out:
            used[:, k] = used[:, k] if exact is None else exact[:, k].double()
            addend = x[:, k, None].double() * used[:, k]
            other, size = other + addend, size + addend.abs()
        else:
            total += levels[:, k, None] * weight[:, k].long()
            size += levels[:, k, None].abs() * steps[:, None].double() * used[:, k].abs()
    y = total * steps.double()[:, None] * scales.double() + other
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return y, size, used, levels, steps


@needs_triton
@patient(10)
@given(
    rows=st.sampled_from([1, 2, 13, 17, 67]),
    outputs=st.sampled_from([1, 7, 32, 65]),
    dim=st.sampled_from([1, 5, 31, 48, 129]),
    dtype=st.sampled_from(list(UNITS)),
    size=st.sampled_from([1e-3, 1.0, 1.0, 1e3]),
    outliers=st.sampled_from([0, 1, 3, 20]),
    exact=st.booleans(),
    biased=st.booleans(),
    bits=st.sampled_from([8, 8, 5]),
    plan=st.sampled_from([-1, -1, 0, 1, 2]),
    layout=st.sampled_from(["plain", "transposed", "every other", "slice"]),
    seed=st.integers(0, 2**16),
)
def test_results_and_gradients_over_random_inputs(
    rows, outputs, dim, dtype, size, outliers, exact, biased, bits, plan, layout, seed
):
    g = torch.Generator().manual_seed(seed)
    x, w = size * torch.randn(rows, dim, generator=g), torch.randn(outputs, dim, generator=g)
    threshold = 5.0 * size  # which a normal entry exceeds once in two million
    place = torch.randperm(dim, generator=g)[:outliers]
    x[torch.randint(rows, (len(place),), generator=g), place] = 11.0 * size
    w *= 10 ** (torch.rand(outputs, 1, generator=g) - 1)
    bias = size * torch.randn(outputs, generator=g).to(dtype) if biased else None
    x, fine = x.to(dtype), w.to(dtype) if exact else None
    grad = torch.randn(rows, outputs, generator=g).to(dtype)
    q = i8.quantize_rows(w)
    given_weight = q.values.T.contiguous().T if layout == "transposed" else q.values
    a = laid_out(x, layout).detach().requires_grad_()
    with interpreter():
        levels, steps, flags = torch.ops.paperbench.int8_quantize_rows(a.detach(), threshold, bits)
        given_fine = None if fine is None else laid_out(fine, layout)
        y, again = OPERATOR(a, given_weight, q.scales, bias, given_fine, threshold, bits, plan)
        (dx,) = torch.autograd.grad(y, a, laid_out(grad, layout))
    truth, parts, used, wanted_levels, wanted_steps = brute_force(
        x, q.values, q.scales, bias, fine, threshold, bits
    )
    assert torch.equal(levels[:, :dim].long(), wanted_levels) and not levels[:, dim:].any()
    assert torch.equal(steps, wanted_steps) and torch.equal(flags, again)
    assert flags.nonzero()[:, 0].tolist() == sorted(place.tolist())
    unit = UNITS[dtype]
    small = 0.0 if dtype != torch.float16 else 2.0**-24  # spacing of subnormal results and weights
    assert ((y.double() - truth).abs() <= unit * truth.abs() + 2.0**-20 * parts + small).all()
    wanted, addends = grad.double() @ used, grad.double().abs() @ used.abs()
    small *= 1 + q.scales.double().amax() * grad.double().abs().sum(1)[:, None]
    assert ((dx.double() - wanted).abs() <= unit * wanted.abs() + 1.1 * unit * addends + small).all()


@needs_triton
def test_empty_and_batched_inputs():
    g = torch.Generator().manual_seed(0)
    weight = i8.quantize_rows(torch.randn(5, 3, generator=g))
    bias = torch.randn(5, generator=g)
    with interpreter():
        for shape in ((0, 3), (2, 0, 3), (3,), (2, 4, 3)):
            found = []
            for impl in ("triton", "torch"):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
                y = i8.int8_outlier_matmul(x, weight.values, weight.scales, bias, threshold=1.0, impl=impl)
                found.append((y, *torch.autograd.grad(y.sum(), x), *i8.quantize_rows(x, 1.0, impl=impl)))
            assert found[0][0].shape == (*shape[:-1], 5) and found[0][3].shape == shape[:-1]
            for a, b in zip(*found):
                torch.testing.assert_close(a, b)
        nothing = i8.quantize_rows(torch.zeros(5, 0))
        for impl in ("triton", "torch"):  # no columns leave the bias, no outputs leave nothing
            y = i8.int8_outlier_matmul(torch.zeros(2, 0), nothing.values, nothing.scales, bias, impl=impl)
            assert torch.equal(y, bias.expand(2, 5))
            y = i8.int8_outlier_matmul(torch.zeros(2, 3), weight.values[:0], weight.scales[:0], impl=impl)
            assert y.shape == (2, 0)


@needs_triton
def test_infinite_entries_and_large_numbers():
    g = torch.Generator().manual_seed(1)
    weight = i8.quantize_rows(torch.randn(4, 40, generator=g))
    for dtype, size in ((torch.bfloat16, 1e34), (torch.float32, 1e-30), (torch.float16, 6e4)):
        x = (size * (2 * torch.rand(6, 40, generator=g) - 1)).to(dtype)
        x[1], x[2, 7], x[4, 9], x[4, 7] = 0.0, -torch.inf, torch.nan, torch.inf
        with warnings.catch_warnings(), interpreter():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = i8.int8_outlier_matmul(
                x, weight.values, weight.scales, threshold=float("inf"), impl="triton"
            )
        wanted = i8.int8_outlier_matmul(x, weight.values, weight.scales, threshold=float("inf"))
        assert torch.equal(found[1], torch.zeros(4, dtype=dtype)) and found[4].isnan().all()
        assert relative_error(found, wanted) < 2 * UNITS[dtype]


@needs_triton
def test_bias_alone_has_a_gradient():
    g = torch.Generator().manual_seed(2)
    x, grad = torch.randn(3, 9, generator=g), torch.randn(3, 4, generator=g)
    weight, bias = i8.quantize_rows(torch.randn(4, 9, generator=g)), torch.zeros(4, requires_grad=True)
    with interpreter():
        y = i8.int8_outlier_matmul(x, weight.values, weight.scales, bias, impl="triton")
        torch.testing.assert_close(torch.autograd.grad(y, bias, grad)[0], grad.sum(0))
        assert not i8.int8_outlier_matmul(x, weight.values, weight.scales, impl="triton").requires_grad


@needs_triton
def test_opcheck():
    g = torch.Generator().manual_seed(3)
    x, w = 4 * torch.randn(3, 20, generator=g), torch.randn(5, 20, generator=g)
    weight, bias = i8.quantize_rows(w), torch.randn(5, generator=g, requires_grad=True)
    with interpreter():
        for extra in ((bias, w), (None, None)):
            arguments = (x.clone().requires_grad_(), weight.values, weight.scales, *extra, 6.0, 8, -1)
            result = torch.library.opcheck(OPERATOR.default, arguments)
            assert set(result.values()) == {"SUCCESS"} and len(result) >= 4
        flags = OPERATOR(*arguments)[1]
        for operator, inputs in (
            (torch.ops.paperbench.int8_quantize_rows, (x, 6.0, 8)),
            (
                torch.ops.paperbench.int8_outlier_matmul_backward,
                (torch.randn(3, 5), weight.values, weight.scales, w, flags),
            ),
        ):
            result = torch.library.opcheck(
                operator.default, inputs, test_utils=("test_schema", "test_faketensor")
            )
            assert set(result.values()) == {"SUCCESS"}


def test_gradcheck_of_the_reference():
    g = torch.Generator().manual_seed(4)
    x = torch.randn(4, 6, dtype=torch.float64, generator=g, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, generator=g, requires_grad=True)
    w = torch.randn(3, 6, dtype=torch.float64, generator=g)
    q = i8.quantize_rows(w)

    def product(x, bias, threshold=0.0):
        return i8.int8_outlier_matmul(
            x, q.values, q.scales, bias, outlier_weight=w if threshold else None, threshold=threshold
        )

    assert torch.autograd.gradcheck(product, (x, bias))  # nothing in eight bits: a true derivative
    assert torch.autograd.gradgradcheck(product, (x, bias))
    upstream = torch.randn(4, 3, dtype=torch.float64, generator=g)
    (through,) = torch.autograd.grad(product(x, bias, 1.5), x, upstream)  # some columns in eight bits
    outliers = i8.quantize_rows(x, 1.5).outliers
    assert 0 < outliers.sum() < 6
    torch.testing.assert_close(through, upstream @ torch.where(outliers, w, q.values * q.scales[:, None]))


def test_one_graph_through_the_reference():
    g = torch.Generator().manual_seed(5)
    weight = i8.quantize_rows(torch.randn(3, 7, generator=g))
    x = (4 * torch.randn(5, 7, generator=g)).requires_grad_()
    compiled = torch.compile(
        lambda x: i8.int8_outlier_matmul(x, weight.values, weight.scales), fullgraph=True, backend="aot_eager"
    )
    found, wanted = compiled(x), i8.int8_outlier_matmul(x, weight.values, weight.scales)
    torch.testing.assert_close(found, wanted)
    a, b = (torch.autograd.grad(y.sum(), x) for y in (found, wanted))
    torch.testing.assert_close(a, b)


@needs_triton
def test_the_operator_does_not_break_the_graph():
    g = torch.Generator().manual_seed(6)
    weight, x = i8.quantize_rows(torch.randn(3, 6, generator=g)), 4 * torch.randn(2, 6, generator=g)
    found, code = compiled_graph(
        lambda x, w, s: 2 * OPERATOR(x + 1, w, s, None, None, 6.0, 8, -1)[0],
        x,
        weight.values,
        weight.scales,
    )
    assert "paperbench.int8_outlier_matmul" in code
    torch.testing.assert_close(found, 2 * i8.int8_outlier_matmul(x + 1, weight.values, weight.scales))


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles(target, compile_sample):
    def chosen(c):
        return c.dtype == torch.bfloat16 and c.labels["tile"].startswith("128")

    compile_sample(i8.configurations((target,)), chosen, 2)


def test_benchmark_runs_on_a_cpu():
    found = i8.benchmark(
        "cpu",
        shapes=((20, 40, 24), (4, 24, 8)),
        outliers=2,
        dtype=torch.float32,
        compiled=False,
        rounds=2,
        peak_size=64,
    )
    assert len(found["parity"]) == 2 and max(max(p.values()) for p in found["parity"].values()) < 1e-5
    timed = {(row["rows"], row["competitor"]): row for row in found["rows"] if "skipped" not in row}
    assert len(found["rows"]) == 10 and len(timed) == 6
    for row in timed.values():
        assert row["forward"]["median"] > 0 and row["share of 8-bit peak"] > 0 and 0 < row["error"] < 0.05
    for rows in (20, 4):  # the chain of operations computes the same function
        errors = [timed[rows, name]["error"] for name in ("kernel", "PyTorch")]
        assert abs(errors[0] - errors[1]) < 1e-6
