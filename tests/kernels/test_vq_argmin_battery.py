"""Nearest codes over random inputs, as an operator, and as a citizen of PyTorch's compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import core
from paperbench.kernels import vq_argmin as vq
from paperbench.kernels.core import interpreter

BOUNDS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
OPERATOR = torch.ops.paperbench.vq_argmin


def brute_force(x, codebook):
    """Indices by differences in float64, without any function of the module."""
    return (x.double()[:, None] - codebook.double()).square().sum(-1).argmin(-1)


@needs_triton
@patient(11)
@given(
    rows=st.sampled_from([1, 2, 17, 33]),
    codes=st.sampled_from([1, 2, 31, 64, 65, 130]),
    dim=st.sampled_from([1, 2, 7, 16, 48, 67]),
    dtype=st.sampled_from(list(BOUNDS)),
    size=st.sampled_from([1e-3, 1.0, 50.0]),
    offset=st.sampled_from([0.0, 0.0, 30.0]),
    whole=st.booleans(),
    layout=st.sampled_from(["plain", "transposed", "every other", "slice", "strided"]),
    tile=st.sampled_from([(0, 0, 0), (16, 16, 2), (32, 64, 1)]),
    seed=st.integers(0, 2**16),
)
def test_results_and_gradients_over_random_inputs(
    rows, codes, dim, dtype, size, offset, whole, layout, tile, seed
):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        drawn = torch.randn(shape, generator=g)
        return ((drawn.round() if whole else size * drawn) + offset).to(dtype)  # whole numbers tie

    x, codebook = draw(rows, dim), draw(codes, dim)
    weights, upstream = torch.randn(rows, generator=g), torch.randn(rows, dim, generator=g).to(dtype)
    a, b = laid_out(x, layout).detach().requires_grad_(), laid_out(codebook, layout).detach().requires_grad_()
    with interpreter():
        distance, chosen, index, count, _ = OPERATOR(a, b, True, *tile)
        chosen = chosen[:, :dim]
        found = torch.autograd.grad([distance, chosen], [a, b], [weights, upstream])
    truth = brute_force(x, codebook)
    assert torch.equal(index, truth) and torch.equal(count, torch.bincount(truth, minlength=codes))
    assert torch.equal(chosen, codebook[truth])
    difference = x.double() - codebook.double()[truth]
    torch.testing.assert_close(distance.double(), difference.square().sum(-1), rtol=1e-5, atol=0)
    wanted_x = 2 * weights.double()[:, None] * difference
    parts = torch.stack([wanted_x.abs(), upstream.double().abs()]).sum(0)
    wanted, scale = torch.zeros(2, codes, dim, dtype=torch.float64)
    wanted.index_add_(0, truth, upstream.double() - wanted_x)
    scale.index_add_(0, truth, parts)  # rounding is relative to the addends, which may cancel
    assert ((found[0].double() - wanted_x).abs() <= BOUNDS[dtype] * wanted_x.abs() + 1e-7).all()
    assert ((found[1].double() - wanted).abs() <= BOUNDS[dtype] * scale + 1e-7).all()


@needs_triton
def test_empty_and_batched_inputs():
    codebook = torch.randn(5, 3, requires_grad=True)
    with interpreter():
        for shape in ((0, 3), (2, 0, 3), (3,), (2, 4, 3)):
            x = torch.randn(shape, requires_grad=True)
            q = vq.vq_argmin(x, codebook, gather=True, impl="triton")
            assert q.indices.shape == q.distances.shape == shape[:-1] and q.codes.shape == shape
            assert int(q.counts.sum()) == x.numel() // 3
            wanted = vq.vq_argmin(x, codebook, gather=True, impl="torch")
            assert torch.equal(q.indices, wanted.indices) and torch.equal(q.counts, wanted.counts)
            gradients = [
                torch.autograd.grad((r.distances.sum(), r.codes.sum()), (x, codebook)) for r in (q, wanted)
            ]
            for a, b in zip(*gradients):
                torch.testing.assert_close(a, b)


@needs_triton
def test_one_argument_at_a_time():
    x, codebook = torch.randn(6, 3), torch.randn(4, 3)
    with interpreter():
        for which in (0, 1):
            pair = [x.clone(), codebook.clone()]
            pair[which].requires_grad_()
            (found,) = torch.autograd.grad(vq.vq_argmin(*pair, impl="triton").distances.sum(), pair[which])
            (wanted,) = torch.autograd.grad(vq.vq_argmin(*pair, impl="torch").distances.sum(), pair[which])
            torch.testing.assert_close(found, wanted)
        assert not vq.vq_argmin(x, codebook, impl="triton").distances.requires_grad


def test_the_reference_equals_brute_force():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x, codebook = (
            (torch.randn(50, 6, generator=g) + 20).to(dtype),
            (torch.randn(30, 6, generator=g) + 20).to(dtype),
        )
        q = vq.vq_argmin(x.view(5, 10, 6), codebook, gather=True)
        assert torch.equal(q.indices.flatten(), brute_force(x, codebook)) and q.codes.dtype == dtype
        assert q.distances.dtype == (dtype if dtype == torch.float64 else torch.float32)
    many = vq.vq_argmin(torch.zeros(2**13, 1), torch.zeros(2**10, 1))  # several chunks of rows
    assert not many.indices.any() and many.counts[0] == 2**13


def test_segments_cover_all_rows_once():
    g = torch.Generator().manual_seed(0)
    for rows, codes, favourite in ((1, 1, 0), (1000, 7, 0), (700, 900, 0), (2000, 5, 3), (513, 2, 1)):
        index = torch.randint(codes, (rows,), generator=g)
        index[: rows // 2 if favourite else 0] = favourite
        count = torch.bincount(index, minlength=codes)
        code, first, last, start = vq._cut_segments(count, rows)
        order = torch.argsort(index, stable=True)
        seen = torch.cat([order[a:b] for a, b in zip(first, last)])
        assert torch.equal(seen.sort().values, torch.arange(rows))
        for piece, (a, b) in enumerate(zip(first, last)):
            assert b - a <= vq.PIECE and (index[order[a:b]] == code[piece]).all()
            assert b <= a or start[code[piece]] <= piece < start[code[piece] + 1]


@needs_triton
def test_opcheck():
    with interpreter():
        x, codebook = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
        for gather in (True, False):
            result = torch.library.opcheck(OPERATOR.default, (x, codebook, gather, 0, 0, 0))
            assert set(result.values()) == {"SUCCESS"} and len(result) >= 4
        x, codebook = x.detach(), codebook.detach()
        distance, chosen, index, count, _ = OPERATOR(x, codebook, True, 0, 0, 0)
        arguments = (x, codebook, index, count, distance, chosen, True)
        backward = torch.ops.paperbench.vq_argmin_backward.default
        result = torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(result.values()) == {"SUCCESS"}


def test_gradcheck_of_the_reference():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, dtype=torch.float64, generator=g, requires_grad=True)
    codebook = torch.randn(4, 3, dtype=torch.float64, generator=g, requires_grad=True)

    def outputs(x, codebook):
        q = vq.vq_argmin(x, codebook, gather=True)
        return q.distances, q.codes

    assert torch.autograd.gradcheck(outputs, (x, codebook))
    assert torch.autograd.gradgradcheck(outputs, (x, codebook))


def test_one_graph_through_the_reference():
    x, codebook = torch.randn(7, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    compiled = torch.compile(lambda x, c: vq.vq_argmin(x, c), fullgraph=True, backend="aot_eager")
    found, wanted = compiled(x, codebook), vq.vq_argmin(x, codebook)
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.counts, wanted.counts)
    a, b = (torch.autograd.grad(q.distances.sum(), (x, codebook)) for q in (found, wanted))
    torch.testing.assert_close(a, b)


@needs_triton
def test_the_operator_does_not_break_the_graph():
    x, codebook = torch.randn(2, 6), torch.randn(3, 6)
    found, code = compiled_graph(lambda x, c: OPERATOR(2 * x, c, False, 0, 0, 0)[2] + 1, x, codebook)
    assert "paperbench.vq_argmin" in code
    assert torch.equal(found, brute_force(2 * x, codebook) + 1)


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles(target, compile_sample):
    def chosen(c):
        return c.kernel is vq.scan_kernel and c.dtype == torch.float16

    compile_sample(vq.configurations((target,)), chosen, 2)


def test_benchmark_runs_on_a_cpu():
    found = vq.benchmark(
        "cpu", shapes=((20, 9, 5), (4, 3, 2)), dtypes=(torch.float32,), compiled=False, rounds=2, peak_size=32
    )
    assert len(found["parity"]) == 2 and max(max(p.values()) for p in found["parity"].values()) < 1e-5
    timed = [row for row in found["rows"] if "skipped" not in row]
    assert len(found["rows"]) == 10 and len(timed) >= 4
    assert all(row["search"]["median"] > 0 and row["share of matrix peak"] > 0 for row in timed)
    assert all(row["wrong indices"] == 0 for row in timed if row["competitor"] == "kernel")
