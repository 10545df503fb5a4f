"""Λ-shaped flash attention over random texts, as an operator, and as a citizen of PyTorch's compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import core
from paperbench.kernels import lambda_flash_attention as lf
from paperbench.kernels.core import interpreter, relative_error

BOUNDS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
OPERATOR = torch.ops.paperbench.lambda_flash_attention


def problem(batch, heads, kv_heads, queries, slots, dim, n_start, seed):
    """Queries, keys and values in float64, lengths, and gaps that are zero where a query is a start token."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads, queries), (kv_heads, slots), (kv_heads, slots)]
    inputs = [torch.randn(batch, *s, dim, generator=g, dtype=torch.float64) for s in shapes]
    lengths = torch.randint(slots + 1, (batch,), generator=g)
    gap = torch.randint(90, (batch,), generator=g) * (lengths - queries >= n_start)
    return inputs, lengths, gap


def one_by_one(inputs, lengths, gap, n_start, window, ceiling, base, scale):
    """Softmax attention in float64, one row and query at a time; each key at the distance that is felt."""
    q, k, v = (x.double() for x in inputs)
    half, group = q.shape[3] // 2, q.shape[1] // k.shape[1]
    theta = 0 * torch.arange(half).double() if base is None else base ** (-torch.arange(half).double() / half)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            i = int(lengths[b]) - q.shape[2] + n
            slots = [j for j in range(i + 1) if j < n_start or i - j < window]
            if not slots:
                continue
            place = torch.tensor([j + int(gap[b]) * (j >= n_start) for j in slots])
            angle = (place[-1] - place).clamp(max=ceiling)[:, None] * theta
            kk, vv = (x[b][:, slots].repeat_interleave(group, 0) for x in (k, v))
            a, c = q[b, :, n, None, :half], q[b, :, n, None, half:]
            turned = torch.cat([a * angle.cos() - c * angle.sin(), a * angle.sin() + c * angle.cos()], -1)
            weights = torch.softmax((turned * kk).sum(-1) * scale, -1)
            out[b, :, n] = torch.einsum("ht,htd->hd", weights, vv)
    return out


def arguments(queries, slots, dim, n_start, window, extra, base):
    """Table, pinned tokens, window and ceiling of a direct call of the operator."""
    table = lf.rotary_table(lf.table_rows(queries, n_start, window, window + extra), dim, base)
    return table, (min(n_start, slots), window, window + extra)


@needs_triton
@patient(10)
@given(
    batch=st.sampled_from([0, 1, 2, 3]),
    heads=st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2)]),
    queries=st.sampled_from([0, 1, 3, 16, 17, 37]),
    slots=st.sampled_from([0, 1, 31, 64, 130]),
    dim=st.sampled_from([2, 6, 16, 34, 64, 80]),
    n_start=st.sampled_from([0, 1, 5, 16, 20]),
    window=st.sampled_from([1, 7, 40, 100]),
    extra=st.sampled_from([-1, 0, 13]),
    base=st.sampled_from([None, 10.0, 10_000.0]),
    dtype=st.sampled_from(list(BOUNDS)),
    segment=st.sampled_from([0, 64]),
    size=st.sampled_from([1e-3, 1.0, 20.0]),
    layout=st.sampled_from(["plain", "transposed", "every other", "odd slice", "strided", "tokens first"]),
    seed=st.integers(0, 2**16),
)
def test_random_texts(
    batch, heads, queries, slots, dim, n_start, window, extra, base, dtype, segment, size, layout, seed
):
    inputs, lengths, gap = problem(batch, *heads, queries, slots, dim, n_start, seed)
    inputs = [(size * x if i == 0 else x).to(dtype) for i, x in enumerate(inputs)]
    wanted = one_by_one(inputs, lengths, gap, n_start, window, window + extra, base, 0.3)
    for b in range(batch):
        for x in inputs[1:]:
            x[b, :, int(lengths[b]) :] = torch.nan
    table, options = arguments(queries, slots, dim, n_start, window, extra, base)
    with interpreter():
        args = (table, lengths, gap, *options, 0.3, segment)
        found = OPERATOR(*(laid_out(x, layout) for x in inputs), *args)[..., :dim]
    assert found.shape == inputs[0].shape and found.dtype == dtype
    # scores are rounded relative to the size of their addends, so sharp weights carry a larger error
    assert relative_error(found, wanted) < BOUNDS[dtype] * (1 + size)
    options = dict(gap=gap, n_start=n_start, window=window, max_distance=window + extra, base=base, scale=0.3)
    reference = lf.lambda_flash_attention(*inputs, lengths, **options, impl="torch")
    assert relative_error(reference, wanted) < BOUNDS[dtype] * (1 + size)


@patient(10)
@given(
    queries=st.sampled_from([1, 3, 17, 70, 150]),
    slots=st.sampled_from([1, 31, 130]),
    n_start=st.sampled_from([0, 1, 5, 20]),
    window=st.sampled_from([1, 7, 40]),
    extra=st.sampled_from([-1, 0, 13]),
    seed=st.integers(0, 2**16),
)
def test_gradients_of_random_texts(queries, slots, n_start, window, extra, seed):
    """The block-wise formula against autograd through the reference, with NaN where nobody looks."""
    inputs, lengths, gap = problem(2, 2, 1, queries, slots, 6, n_start, seed)
    for b in range(2):
        for x in inputs[1:]:
            x[b, :, int(lengths[b]) :] = torch.nan
    inputs = [x.requires_grad_() for x in inputs]
    options = dict(n_start=n_start, window=window, scale=0.3)
    out = lf.lambda_flash_attention(*inputs, lengths, gap=gap, max_distance=window + extra, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = torch.autograd.grad(out, inputs, grad)
    rows = lf.table_rows(queries, n_start, window, window + extra)
    table = lf.rotary_table(rows, 6, dtype=torch.float64)
    options["n_start"] = min(n_start, slots)
    detached = [x.detach() for x in inputs]
    found = lf.lambda_flash_attention_gradient(grad, *detached, table, lengths, gap, ceiling=window + extra, **options)
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@needs_triton
def test_launches_ask_only_for_what_was_compiled(watched_launches):
    seen = watched_launches(lf)
    for queries, dim in ((1, 18), (40, 18), (66, 136)):
        inputs, lengths, gap = problem(2, 2, 1, queries, 90, dim, 3, 0)
        table, options = arguments(queries, 90, dim, 3, 70, 0, 10_000.0)
        odd = torch.zeros(table.numel() + 1)[1:].view_as(table).copy_(table)
        for dtype in BOUNDS if dim < 100 else (torch.float16,):
            for layout in ("plain", "odd slice"):
                cast = [laid_out(x.to(dtype), layout) for x in inputs]
                ends, gaps = (torch.cat([x[:1], x]).int()[1:] for x in (lengths, gap))
                with interpreter():
                    OPERATOR(*cast, odd, ends, gaps, *options, 0.3, 64 if queries == 1 else 0)
    kernels = {lf.lambda_attention_kernel: (False, True), lf.turn_kernel: (None,), lf.merge_kernel: (None,)}
    found = {(kernel, constants.get("BEFOREHAND")) for kernel, constants in seen}
    assert found == {(kernel, flag) for kernel, flags in kernels.items() for flag in flags}


def small(dtype=torch.float32, grad=False):
    """Arguments of a small call."""
    inputs, _, _ = problem(2, 2, 1, 3, 9, 6, 2, 2)
    return [x.to(dtype).requires_grad_(grad) for x in inputs], torch.tensor([9, 4]), torch.tensor([3, 0])


@needs_triton
def test_opcheck():
    inputs, lengths, gap = small(grad=True)
    table, options = arguments(3, 9, 6, 2, 4, 1, 10_000.0)
    with interpreter():
        for extra in ((None, None), (lengths, gap)):
            result = torch.library.opcheck(OPERATOR.default, (*inputs, table, *extra, *options, 0.4, 0))
            assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


@needs_triton
def test_the_operator_does_not_break_the_graph():
    inputs, lengths, gap = small()
    table, options = arguments(3, 9, 6, 2, 4, 1, 10_000.0)

    def call(q, *rest):
        return OPERATOR(2 * q, *rest, *options, 0.2, 0) + 1

    found, code = compiled_graph(call, *inputs, table, lengths, gap)
    assert "paperbench.lambda_flash_attention" in code
    wanted = lf.lambda_flash_attention(*inputs, lengths, gap=gap, n_start=2, window=4, max_distance=5, scale=0.4) + 1
    torch.testing.assert_close(found[..., :6], wanted, rtol=1e-5, atol=1e-6)


def test_gradcheck_of_the_reference():
    inputs, lengths, gap = small(torch.float64, grad=True)
    options = dict(gap=gap, n_start=2, window=4)
    assert torch.autograd.gradcheck(lambda *x: lf.lambda_flash_attention(*x, lengths, **options), inputs)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
def test_one_graph_with_gradients(impl):
    inputs, lengths, gap = small(grad=True)

    def call(*x):
        return lf.lambda_flash_attention(*x, lengths, gap=gap, n_start=2, window=4, impl=impl)

    with interpreter():
        found, wanted = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs)
        torch.testing.assert_close(found, wanted)
        a, b = (torch.autograd.grad(x.square().sum(), inputs) for x in (found, wanted))
    torch.testing.assert_close(a, b)


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles(target, compile_sample):
    def chosen(c):
        return c.dtype == torch.float16 and c.labels["D"] == 64 and c.labels["rows"] != 64

    compile_sample(lf.configurations((target,)), chosen, 3)


@needs_triton
def test_tritons_own_switch_works_too(run_python):
    code = """
import torch
from paperbench.kernels.core import relative_error
from paperbench.kernels.lambda_flash_attention import lambda_flash_attention
q, k, v = torch.rand(3, 1, 2, 9, 4)
found, wanted = (lambda_flash_attention(q, k, v, n_start=2, window=3, impl=impl) for impl in ("triton", "torch"))
print(relative_error(found, wanted) < 1e-5)
"""
    assert run_python(code, TRITON_INTERPRET="1").strip() == "True"
