"""SortLSH block attention over random groupings, as an operator, and as a citizen of PyTorch's compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import compiled_graph, laid_out, needs_triton, patient

from paperbench.attention.hyperattention import Blocks, draw_keys, sort_blocks
from paperbench.kernels import core
from paperbench.kernels import sortlsh_block_attention as sb
from paperbench.kernels.core import interpreter, relative_error

BOUNDS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
OPERATOR = torch.ops.paperbench.sortlsh_block_attention


def problem(batch, heads, kv_heads, queries, keys, dim, value_dim, block, samples, align, sampling, seed):
    """Queries, keys and values in float64, blocks, drawn keys and their factors."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)]
    q, k, v = (torch.randn(batch, *s, generator=g, dtype=torch.float64) for s in shapes)
    group = heads // kv_heads
    blocks = sort_blocks(q, k.repeat_interleave(group, 1), block, bits=3, align=align, generator=g)
    order, number = (x[:, ::group].contiguous() for x in (blocks.key_order, blocks.key_block))
    blocks = blocks._replace(key_order=order, key_block=number)
    drawn = draw_keys(v, samples, sampling=sampling, generator=g) if samples and batch else None
    if drawn is None:
        drawn = blocks.key_order[:, :, :0], v.new_zeros(batch, kv_heads, 0)
    return [q, k, v], blocks, *drawn


def dense(inputs, blocks, chosen, factor, scale):
    """All pairs in float64, each with its multiplicity."""
    q, k, v = (x.double() for x in inputs)
    group = q.shape[1] // k.shape[1]
    k, v, of_key, chosen, factor = (x.repeat_interleave(group, 1) for x in (k, v, blocks.key_block, chosen, factor))
    same = blocks.query_block[..., None] == of_key[:, :, None]
    counts = torch.zeros(of_key.shape, dtype=torch.float64).scatter_add_(2, chosen, factor.double().exp())
    weight = torch.where(same, 1.0, counts[:, :, None].expand(same.shape))
    scores = scale * q @ k.mT + weight.log()
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@needs_triton
@patient(12)
@given(
    batch=st.sampled_from([1, 2, 3]),
    heads=st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2)]),
    queries=st.sampled_from([1, 3, 16, 17, 37, 70]),
    keys=st.sampled_from([1, 31, 64, 90]),
    dim=st.sampled_from([2, 6, 16, 34, 64, 80]),
    value_dim=st.sampled_from([1, 16, 70]),
    block=st.sampled_from([1, 5, 16, 33, 100]),
    samples=st.sampled_from([0, 1, 17, 40]),
    align=st.sampled_from(["rank", "keys"]),
    sampling=st.sampled_from(["uniform", "norm"]),
    dtype=st.sampled_from(list(BOUNDS)),
    rows=st.sampled_from([0, 16, 32]),
    size=st.sampled_from([1e-3, 1.0, 20.0]),
    layout=st.sampled_from(["plain", "transposed", "every other", "odd slice", "strided", "tokens first"]),
    seed=st.integers(0, 2**16),
)
def test_random_groupings(
    batch, heads, queries, keys, dim, value_dim, block, samples, align, sampling, dtype, rows, size, layout, seed
):
    sizes = (batch, *heads, queries, keys, dim, value_dim, block, samples)
    inputs, blocks, chosen, factor = problem(*sizes, align, sampling, seed)
    inputs = [(size * x if i == 0 else x).to(dtype) for i, x in enumerate(inputs)]
    wanted = dense(inputs, blocks, chosen, factor, 0.3)
    with interpreter():
        options = (blocks.size, blocks.equal, 0.3, rows)
        out, lse = OPERATOR(*(laid_out(x, layout) for x in inputs), *blocks[:4], chosen, factor, *options)
    reference = sb.sortlsh_block_attention(*inputs, blocks, chosen, factor, scale=0.3, impl="torch")
    for a, b in ((out[..., :value_dim], lse), reference):
        assert a.shape == wanted[0].shape and a.dtype == dtype
        # scores are rounded relative to the size of their addends, so sharp weights carry a larger error
        assert relative_error(a, wanted[0]) < BOUNDS[dtype] * (1 + size)
        torch.testing.assert_close(b.double(), wanted[1], rtol=1e-5, atol=1e-5 * (1 + size))


@patient(10)
@given(
    queries=st.sampled_from([1, 3, 17, 70]),
    keys=st.sampled_from([1, 31, 90]),
    block=st.sampled_from([1, 7, 40]),
    samples=st.sampled_from([0, 1, 20]),
    align=st.sampled_from(["rank", "keys"]),
    sampling=st.sampled_from(["uniform", "norm"]),
    seed=st.integers(0, 2**16),
)
def test_gradients_of_random_groupings(queries, keys, block, samples, align, sampling, seed):
    """The group-wise formula against autograd through all pairs."""
    inputs, blocks, chosen, factor = problem(2, 2, 1, queries, keys, 6, 3, block, samples, align, sampling, seed)
    inputs = [x.requires_grad_() for x in inputs]
    out, lse = dense(inputs, blocks, chosen, factor, 0.3)
    g = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (out, lse)]
    wanted = torch.autograd.grad((out, lse), inputs, grads)
    detached = [x.detach() for x in (*inputs, out, lse)]
    options = dict(size=blocks.size, equal=blocks.equal, scale=0.3, limit=3000)
    found = sb.sortlsh_block_attention_gradient(*grads, *detached, *blocks[:4], chosen, factor, **options)
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@needs_triton
def test_launches_ask_only_for_what_was_compiled(watched_launches):
    seen = watched_launches(sb)
    for dim in (18, 70, 136):
        inputs, blocks, chosen, factor = problem(2, 2, 1, 21, 30, dim, dim - 6, 8, 5, "rank", "uniform", 0)
        odd = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x) for x in (*blocks[:4], chosen, factor.float())]
        for dtype in BOUNDS if dim < 100 else (torch.float16,):
            for layout in ("plain", "odd slice"):
                cast = [laid_out(x.to(dtype), layout) for x in inputs]
                with interpreter():
                    OPERATOR(*cast, *odd, blocks.size, blocks.equal, 0.3, 0)
    assert {constants["WIDTH"] for _, constants in seen} == {64, 128, 256}


def small(dtype=torch.float32, grad=False):
    """Arguments of a small call."""
    inputs, *rest = problem(2, 2, 1, 7, 9, 6, 4, 4, 3, "rank", "uniform", 2)
    return [x.to(dtype).requires_grad_(grad) for x in inputs], *rest


@needs_triton
def test_opcheck():
    inputs, blocks, chosen, factor = small(grad=True)
    with interpreter():
        args = (*inputs, *blocks[:4], chosen, factor.float(), blocks.size, blocks.equal, 0.4, 0)
        result = torch.library.opcheck(OPERATOR.default, args)
        assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


@needs_triton
def test_the_operator_does_not_break_the_graph():
    inputs, blocks, chosen, factor = small()

    def call(q, *rest):
        out, lse = OPERATOR(2 * q, *rest, blocks.size, blocks.equal, 0.2, 0)
        return out + lse[..., None]

    found, code = compiled_graph(call, *inputs, *blocks[:4], chosen, factor)
    assert "paperbench.sortlsh_block_attention" in code
    out, lse = sb.sortlsh_block_attention(*inputs, blocks, chosen, factor, scale=0.4)
    torch.testing.assert_close(found[..., :4], out + lse[..., None], rtol=1e-5, atol=1e-5)


def test_gradcheck_of_the_reference():
    inputs, *rest = small(torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *x: sb.sortlsh_block_attention(*x, *rest), inputs)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
def test_one_graph_with_gradients(impl):
    inputs, blocks, chosen, factor = small(grad=True)

    def call(q, k, v, order, other, own, of_key, chosen, factor):
        found = Blocks(order, other, own, of_key, blocks.count, blocks.size, blocks.equal)
        out, lse = sb.sortlsh_block_attention(q, k, v, found, chosen, factor, impl=impl)
        return out * lse[..., None]

    args = (*inputs, *blocks[:4], chosen, factor.float())
    with interpreter():
        found, wanted = torch.compile(call, fullgraph=True, backend="aot_eager")(*args), call(*args)
        torch.testing.assert_close(found, wanted)
        a, b = (torch.autograd.grad(x.square().sum(), inputs) for x in (found, wanted))
    torch.testing.assert_close(a, b)


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles(target, compile_sample):
    def chosen(c):
        return c.dtype == torch.float16 and c.labels["D"] == 64

    compile_sample(sb.configurations((target,)), chosen, 2)


@needs_triton
def test_tritons_own_switch_works_too(run_python):
    code = """
import torch
from paperbench.attention.hyperattention import sort_blocks
from paperbench.kernels.core import relative_error
from paperbench.kernels.sortlsh_block_attention import sortlsh_block_attention
q, k, v = torch.rand(3, 1, 2, 9, 4)
blocks, chosen = sort_blocks(q, k, 3, bits=2), torch.tensor([[[0, 8], [3, 4]]])
found, wanted = (sortlsh_block_attention(q, k, v, blocks, chosen, impl=impl)[0] for impl in ("triton", "torch"))
print(relative_error(found, wanted) < 1e-5)
"""
    assert run_python(code, TRITON_INTERPRET="1").strip() == "True"
