"""Prefix-aware attention over random trees, as an operator, and as a citizen of PyTorch's compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import chunk_attention as ca
from paperbench.kernels import core
from paperbench.kernels.core import interpreter, relative_error

BOUNDS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
OPERATOR = torch.ops.paperbench.chunk_attention


def random_tree(rows, chunk, depth, seed):
    """A table of sequences that share chunks where random words begin alike, with ends anywhere in the last chunk."""
    g = torch.Generator().manual_seed(seed)
    places, table, lengths = {}, torch.full((rows, depth), -1), []
    for row in range(rows):
        word = "".join(
            "ab"[int(i)]
            for i in torch.randint(2, (int(torch.randint(depth + 1, (), generator=g)),), generator=g)
        )
        for end in range(1, len(word) + 1):
            table[row, end - 1] = places.setdefault(word[:end], len(places))
        short = int(torch.randint(chunk, (), generator=g)) if word else 0
        lengths.append(len(word) * chunk - short)
    shuffled = torch.randperm(max(len(places), 1), generator=g)
    return torch.where(table < 0, table, shuffled[table.clamp_min(0)]), torch.tensor(lengths)


def one_by_one(q, keys, values, table, lengths, scale):
    """Softmax attention in float64 of each sequence by itself, and the size of the values."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group, chunk = q.shape[1] // keys.shape[1], keys.shape[2]
    for b, n in enumerate(lengths.tolist()):
        if n:
            at = torch.arange(n)
            k, v = (
                x[table[b, at // chunk], :, at % chunk].double().repeat_interleave(group, 1)
                for x in (keys, values)
            )
            weights = torch.softmax(torch.einsum("hd,nhd->hn", q[b].double(), k) * scale, -1)
            out[b] = torch.einsum("hn,nhd->hd", weights, v)
    return out


@needs_triton
@patient(7)
@given(
    rows=st.sampled_from([0, 1, 2, 4, 6]),
    chunk=st.sampled_from([1, 3, 16, 31]),
    heads=st.sampled_from([(1, 1), (2, 2), (3, 1), (10, 2), (18, 1)]),
    dim=st.sampled_from([1, 7, 16, 33, 80]),
    dtype=st.sampled_from(list(BOUNDS)),
    segment=st.sampled_from([0, 1, 2]),
    tile=st.sampled_from([0, 16, 64]),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    layout=st.sampled_from(["plain", "transposed", "every other", "odd slice", "strided"]),
    seed=st.integers(0, 2**16),
)
def test_steps_over_random_trees(rows, chunk, heads, dim, dtype, segment, tile, size, layout, seed):
    g = torch.Generator().manual_seed(seed)
    table, lengths = random_tree(rows, chunk, 3, seed)
    places = max(int(table.amax()) + 1, 1) if rows else 1
    q = torch.randn(rows, heads[0], dim, generator=g).to(dtype)
    keys, values = (torch.randn(places, heads[1], chunk, dim, generator=g) for _ in range(2))
    keys, values = (size * keys).to(dtype), values.to(dtype)
    tile = 16 if dtype == torch.float32 else tile
    plan = ca.make_plan(
        table,
        lengths,
        chunk=chunk,
        heads=heads[0],
        kv_heads=heads[1],
        dtype=dtype,
        segment=segment,
        rows=tile,
    )
    wanted = one_by_one(q, keys, values, table, lengths, 0.3)
    with interpreter():
        found = ca.chunk_attention(
            *(laid_out(x, layout) for x in (q, keys, values)), plan, scale=0.3, impl="triton"
        )
    assert found.shape == q.shape and found.dtype == dtype
    # scores are rounded relative to the size of their addends, so sharp weights carry a larger error
    assert relative_error(found, wanted) < BOUNDS[dtype] * (1 + (size if dtype == torch.float32 else 0))
    reference = ca.chunk_attention(q, keys, values, plan, scale=0.3, impl="torch")
    assert relative_error(reference, wanted) < BOUNDS[dtype] * (1 + size)


def test_the_reference_and_two_phases_in_all_dtypes():
    g = torch.Generator().manual_seed(0)
    table, lengths = random_tree(6, 5, 4, 1)
    for dtype in core.FLOAT_DTYPES:
        q = torch.randn(6, 4, 8, generator=g).to(dtype)
        keys, values = (torch.randn(int(table.max()) + 1, 2, 5, 8, generator=g).to(dtype) for _ in range(2))
        plan = ca.make_plan(table, lengths, chunk=5, heads=4, kv_heads=2, segment=1)
        wanted = one_by_one(q, keys, values, table, lengths, 8**-0.5)
        for found in (
            ca.chunk_attention(q, keys, values, plan),
            ca.two_phase_attention(q, keys, values, plan),
        ):
            assert found.dtype == dtype and relative_error(found, wanted) < BOUNDS.get(dtype, 1e-14)


@needs_triton
def test_no_sequences_and_no_tokens():
    keys = torch.full((2, 1, 4, 8), torch.nan)
    for batch in (0, 3):
        table, lengths = torch.zeros(batch, 1, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
        plan = ca.make_plan(table, lengths, chunk=4, heads=2, kv_heads=1)
        q = torch.randn(batch, 2, 8)
        with interpreter():
            found = ca.chunk_attention(q, keys, keys, plan, impl="triton")
        for out in (
            found,
            ca.chunk_attention(q, keys, keys, plan),
            ca.two_phase_attention(q, keys, keys, plan),
        ):
            assert torch.equal(out, torch.zeros_like(q))


def test_any_table_will_do():
    """Chunks that meet at different depths, or again after a difference, are read for each sequence and counted right."""
    table = torch.tensor([[0, 1, 2], [1, 0, 2], [0, 2, 2], [3, 1, 2]])
    lengths = torch.tensor([12, 11, 10, 9])
    g = torch.Generator().manual_seed(0)
    q, keys, values = (
        torch.randn(4, *s, generator=g, dtype=torch.float64) for s in ((1, 4), (1, 4, 4), (1, 4, 4))
    )
    plan = ca.make_plan(table, lengths, chunk=4, heads=1, kv_heads=1)
    wanted = one_by_one(q, keys, values, table, lengths, 0.5)
    torch.testing.assert_close(ca.two_phase_attention(q, keys, values, plan), wanted, rtol=1e-12, atol=1e-13)


def step(dtype=torch.float32, grad=False):
    """Arguments of a small step."""
    g = torch.Generator().manual_seed(2)
    table, lengths = random_tree(3, 4, 3, 3)
    q = torch.randn(3, 2, 5, generator=g).to(dtype).requires_grad_(grad)
    keys, values = (
        torch.randn(int(table.max()) + 1, 1, 4, 5, generator=g).to(dtype).requires_grad_(grad)
        for _ in range(2)
    )
    return q, keys, values, ca.make_plan(table, lengths, chunk=4, heads=2, kv_heads=1)


@needs_triton
def test_opcheck():
    with interpreter():
        result = torch.library.opcheck(OPERATOR.default, (*flat(*step()), 0.4))
    assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


@needs_triton
def test_the_operator_does_not_break_the_graph():
    arguments = flat(*step())
    found, code = compiled_graph(lambda q, *rest: OPERATOR(2 * q, *rest, 0.2) + 1, *arguments)
    assert "paperbench.chunk_attention" in code
    wanted = ca.chunk_attention(*step(), scale=0.4) + 1
    torch.testing.assert_close(found[..., :5], wanted, rtol=1e-5, atol=1e-6)


def flat(q, keys, values, plan):
    """Arguments of the operator, without the scale."""
    return (
        q,
        keys,
        values,
        plan.order,
        plan.table,
        plan.lengths,
        plan.items,
        plan.starts,
        plan.slots,
        plan.rows,
    )


def test_gradcheck_of_the_reference():
    q, keys, values, plan = step(torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *x: ca.chunk_attention(*x, plan), (q, keys, values))


def test_one_graph_through_the_reference():
    q, keys, values, plan = step(grad=True)
    compiled = torch.compile(ca.chunk_attention, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(q, keys, values, plan), ca.chunk_attention(q, keys, values, plan)
    torch.testing.assert_close(found, wanted)
    a, b = (torch.autograd.grad(x.square().sum(), (q, keys, values)) for x in (found, wanted))
    torch.testing.assert_close(a, b)


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles(target, compile_sample):
    def chosen(c):
        return c.dtype == torch.float16 and c.labels["D"] == 64 and c.labels["rows"] != 64

    compile_sample(ca.configurations((target,)), chosen, 2)


def test_benchmark_runs_on_a_cpu():
    shapes = ((3, 9, 2, 4, 2, 8), (1, 0, 5, 2, 2, 8))
    found = ca.benchmark(
        "cpu", shapes=shapes, chunk=4, dtype=torch.float32, compiled=False, rounds=2, peak_size=32
    )
    assert set(found["parity"]) == {"float32", "float16", "bfloat16"} and found["parity"]["float32"] < 1e-6
    timed = [row for row in found["rows"] if "skipped" not in row]
    assert len(found["rows"]) == 12 and len(timed) >= 6
    assert all(
        row["step"]["median"] > 0 and row["share of bandwidth"] > 0 and row["error"] < 1e-6 for row in timed
    )
