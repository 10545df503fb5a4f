"""Tree attention over random trees and texts, as an operator, and as a citizen of PyTorch's compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import core
from paperbench.kernels import tree_attention as ta
from paperbench.kernels.core import interpreter, relative_error

BOUNDS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
OPERATOR = torch.ops.paperbench.tree_attention


def problem(batch, heads, kv_heads, nodes, slots, dim, seed, per_row=False):
    """Queries, keys and values in float64, parents of a random tree for every row, masks, lengths and holes."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads, nodes), *[(kv_heads, n) for n in (slots, slots, nodes, nodes)]]
    inputs = [torch.randn(batch, *s, dim, generator=g, dtype=torch.float64) for s in shapes]
    parents = [
        [int(torch.randint(-1, node, (), generator=g)) if node else -1 for node in range(nodes)]
        for _ in range(batch)
    ]
    parents = parents if per_row else parents[:1] * batch
    masks = torch.zeros(batch, nodes, nodes, dtype=torch.bool)
    for mask, row in zip(masks, parents):
        for node, parent in enumerate(row):
            mask[node, node] = True
            if parent >= 0:
                mask[node] |= mask[parent]
    lengths = torch.randint(slots + 1, (batch,), generator=g)
    valid = torch.rand(batch, slots, generator=g) < 0.7
    return inputs, parents, masks if per_row or not batch else masks[0], lengths, valid


def one_by_one(inputs, parents, lengths, valid, scale):
    """Softmax attention in float64, one row and node at a time, along the way to the root."""
    q, pk, pv, nk, nv = (x.double() for x in inputs)
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // pk.shape[1]
    for b in range(q.shape[0]):
        used = [t for t in range(int(lengths[b])) if valid is None or valid[b, t]]
        for node in range(q.shape[2]):
            way, at = [], node
            while at >= 0:
                way.append(at)
                at = parents[b][at]
            k, v = (
                torch.cat([x[b][:, used], y[b][:, way]], 1).repeat_interleave(group, 0)
                for x, y in ((pk, nk), (pv, nv))
            )
            weights = torch.softmax(torch.einsum("hd,htd->ht", q[b, :, node], k) * scale, -1)
            out[b, :, node] = torch.einsum("ht,htd->hd", weights, v)
    return out


@needs_triton
@patient(8)
@given(
    batch=st.sampled_from([0, 1, 2, 3]),
    heads=st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2)]),
    nodes=st.sampled_from([0, 1, 3, 16, 17, 37]),
    slots=st.sampled_from([0, 1, 31, 64, 130]),
    dim=st.sampled_from([1, 7, 16, 33, 80]),
    dtype=st.sampled_from(list(BOUNDS)),
    segment=st.sampled_from([0, 64]),
    holes=st.booleans(),
    per_row=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    layout=st.sampled_from(["plain", "transposed", "every other", "odd slice", "strided", "tokens first"]),
    seed=st.integers(0, 2**16),
)
def test_random_trees(batch, heads, nodes, slots, dim, dtype, segment, holes, per_row, size, layout, seed):
    inputs, parents, mask, lengths, valid = problem(batch, *heads, nodes, slots, dim, seed, per_row)
    inputs = [(size * x if i in (1, 3) else x).to(dtype) for i, x in enumerate(inputs)]
    valid = valid if holes else None
    wanted = one_by_one(inputs, parents, lengths, valid, 0.3)
    for b in range(batch):
        for x in inputs[1:3]:
            x[b, :, int(lengths[b]) :] = torch.nan
    with interpreter():
        found = OPERATOR(*(laid_out(x, layout) for x in inputs), mask, lengths, valid, 0.3, segment)[..., :dim]
    assert found.shape == inputs[0].shape and found.dtype == dtype
    # scores are rounded relative to the size of their addends, so sharp weights carry a larger error
    assert relative_error(found, wanted) < BOUNDS[dtype] * (1 + (size if dtype == torch.float32 else 0))
    reference = ta.tree_attention(*inputs, mask, lengths, valid=valid, scale=0.3, impl="torch")
    assert relative_error(reference, wanted) < BOUNDS[dtype] * (1 + size)


@needs_triton
def test_launches_ask_only_for_what_was_compiled(watched_launches):
    seen = watched_launches(ta)
    inputs, _, mask, lengths, valid = problem(2, 4, 2, 5, 70, 19, 0)
    for dtype in BOUNDS:
        for layout in ("plain", "odd slice", "tokens first"):
            cast = [laid_out(x.to(dtype), layout) for x in inputs]
            odd = torch.zeros(26, dtype=torch.bool)[1:].view(5, 5).copy_(mask)
            with interpreter():
                OPERATOR(*cast, odd, torch.cat([lengths[:1], lengths]).int()[1:], valid, 0.3, 64)
    assert {kernel for kernel, _ in seen} == {ta.tree_attention_kernel, ta.merge_kernel}


def small(dtype=torch.float32, grad=False):
    """Arguments of a small call."""
    inputs, _, mask, lengths, valid = problem(2, 2, 1, 3, 4, 5, 2)
    return [x.to(dtype).requires_grad_(grad) for x in inputs], mask, lengths, valid


@needs_triton
def test_opcheck():
    inputs, mask, lengths, valid = small(grad=True)
    with interpreter():
        for extra in ((None, None), (lengths, valid)):
            result = torch.library.opcheck(OPERATOR.default, (*inputs, mask, *extra, 0.4, 0))
            assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


@needs_triton
def test_the_operator_does_not_break_the_graph():
    inputs, mask, lengths, valid = small()
    found, code = compiled_graph(lambda q, *rest: OPERATOR(2 * q, *rest, 0.2, 0) + 1, *inputs, mask, lengths, valid)
    assert "paperbench.tree_attention" in code
    wanted = ta.tree_attention(*inputs, mask, lengths, valid=valid, scale=0.4) + 1
    torch.testing.assert_close(found[..., :5], wanted, rtol=1e-5, atol=1e-6)


def test_gradcheck_of_the_reference():
    inputs, mask, lengths, valid = small(torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *x: ta.tree_attention(*x, mask, lengths, valid=valid), inputs)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
def test_one_graph_with_gradients(impl):
    inputs, mask, lengths, valid = small(grad=True)

    def call(*x):
        return ta.tree_attention(*x, mask, lengths, valid=valid, impl=impl)

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

    compile_sample(ta.configurations((target,)), chosen, 2)


@needs_triton
def test_tritons_own_switch_works_too(run_python):
    code = """
import torch
from paperbench.kernels.core import relative_error
from paperbench.kernels.tree_attention import tree_attention
q, pk, pv, nk, nv = torch.rand(5, 1, 2, 4, 3)
mask = torch.eye(4, dtype=torch.bool)
found, wanted = (tree_attention(q, pk, pv, nk, nv, mask, impl=impl) for impl in ("triton", "torch"))
print(relative_error(found, wanted) < 1e-5)
"""
    assert run_python(code, TRITON_INTERPRET="1").strip() == "True"
