"""A mixture of experts over random routings and layouts, as an operator, in a model, and compiled."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import core
from paperbench.kernels import grouped_expert_ffn as gef
from paperbench.kernels.core import interpreter, relative_error
from paperbench.models.decoder import MixtureOfExperts

BOUNDS = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
OPERATOR = torch.ops.paperbench.grouped_expert_ffn
ACTS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "identity": lambda x: x}


def masked(x, experts, weights, up, down, gate, activation):
    """Every expert for every token by einsum, without any function of the module."""
    inner = torch.einsum("td,ehd->teh", x, up if gate is None else gate)
    hidden = ACTS[activation](inner)
    if gate is not None:
        hidden = hidden * torch.einsum("td,ehd->teh", x, up)
    outputs = torch.einsum("teh,eoh->teo", hidden, down)
    one_hot = (experts[..., None] == torch.arange(len(up))).to(x.dtype)
    return torch.einsum("tke,tk,teo->to", one_hot, weights, outputs)


def layer(tokens, dim, hidden, out, count, chosen, seed, dtype=torch.float32, size=1.0):
    """Routing with some unused slots, and leaves x, weights, up, down, gate."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=g)).to(dtype)

    experts = torch.randint(-1, count, (tokens, chosen), generator=g)
    leaves = [draw(tokens, dim, scale=size), draw(tokens, chosen)]
    leaves += [draw(count, hidden, dim, scale=dim**-0.5), draw(count, out, hidden, scale=hidden**-0.5)]
    return experts, [*leaves, draw(count, hidden, dim, scale=dim**-0.5)]


@needs_triton
@patient(8)
@given(
    tokens=st.sampled_from([1, 2, 7, 19]),
    dim=st.sampled_from([1, 5, 16, 33]),
    hidden=st.sampled_from([1, 3, 16, 65]),
    out=st.sampled_from([1, 4, 17]),
    count=st.sampled_from([1, 2, 4]),
    chosen=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from(list(BOUNDS)),
    size=st.sampled_from([0.3, 1.0, 20.0]),
    gated=st.booleans(),
    activation=st.sampled_from(list(ACTS)),
    layout=st.sampled_from([*LAYOUTS, "odd slice"]),
    tile=st.sampled_from([0, 16]),
    seed=st.integers(0, 2**16),
)
def test_results_and_gradients_over_random_inputs(
    tokens, dim, hidden, out, count, chosen, dtype, size, gated, activation, layout, tile, seed
):
    experts, leaves = layer(tokens, dim, hidden, out, count, chosen, seed, dtype, size)
    leaves = leaves if gated else leaves[:4]
    upstream = torch.randn(tokens, out, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    given_leaves = [laid_out(t, layout).detach().requires_grad_() for t in leaves]
    x, weights, up, down, gate = *given_leaves, *[None] * (5 - len(leaves))
    with interpreter():
        kind = list(ACTS).index(activation)
        result = OPERATOR(x, experts, weights, up, down, gate, kind, True, tile)[0][:, :out]
        found = torch.autograd.grad(result, given_leaves, laid_out(upstream, layout))
    exact = [t.double().requires_grad_() for t in leaves]
    x, weights, up, down, gate = *exact, *[None] * (5 - len(exact))
    truth = masked(x, experts, weights, up, down, gate, activation)
    wanted = torch.autograd.grad(truth, exact, upstream.double())
    names = ("output", "x", "weights", "up", "down", "gate")
    for name, f, w in zip(names, (result, *found), (truth, *wanted)):
        assert f.shape == w.shape and relative_error(f, w) < BOUNDS[dtype], (name, relative_error(f, w))


@needs_triton
def test_high_tiles_of_the_forward_pass():
    experts, leaves = layer(70, 9, 7, 5, 1, 1, 0, torch.bfloat16)
    assert not gef.few_rows(70, 1) and gef.few_rows(70, 5)
    with interpreter():
        found = gef.grouped_expert_ffn(leaves[0], experts, leaves[1], *leaves[2:], impl="triton")
    wide = [t.double() for t in leaves]
    assert relative_error(found, masked(wide[0], experts, wide[1], *wide[2:], "silu")) < 2e-2


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("size", [1e-20, 1e12])
def test_extreme_magnitudes(size):
    experts, leaves = layer(12, 6, 5, 4, 2, 2, 1, torch.float32, size)
    leaves = [t.requires_grad_() for t in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with interpreter():
        found = gef.grouped_expert_ffn(leaves[0], experts, *leaves[1:], impl="triton")
        gradients = torch.autograd.grad(found.sum(), leaves)
    truth = masked(exact[0], experts, *exact[1:], "silu")
    for f, w in zip((found, *gradients), (truth, *torch.autograd.grad(truth.sum(), exact))):
        assert f.isfinite().all() and (w == 0).all() == (f == 0).all()
        assert ((f.double() - w).abs() <= 3e-6 * w.abs().max() + 1e-37).all()


@needs_triton
def test_empty_and_batched_inputs():
    _, (_, _, up, down, gate) = layer(1, 3, 4, 5, 2, 1, 2)
    matrices = [t.requires_grad_() for t in (up, down, gate)]
    for shape, chosen in (((0, 3), 2), ((2, 0, 3), 1), ((4, 3), 0), ((3,), 2), ((2, 4, 3), 2)):
        x = torch.randn(shape, requires_grad=True)
        experts = torch.arange(x.numel() // 3 * chosen).reshape(*shape[:-1], chosen).remainder(3) - 1
        weights = torch.randn(experts.shape, requires_grad=True)
        leaves = (x, weights, *matrices)
        results = []
        for impl in ("triton", "torch"):
            with interpreter():
                y = gef.grouped_expert_ffn(x, experts.int(), weights, up, down, gate, impl=impl)
                results.append((y, *torch.autograd.grad(y.sum(), leaves, allow_unused=not y.numel())))
        assert results[0][0].shape == (*shape[:-1], 5)
        for a, b in zip(*results):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@needs_triton
def test_one_argument_at_a_time_and_weights_in_float32():
    experts, leaves = layer(6, 5, 4, 5, 2, 2, 3, torch.bfloat16)
    leaves[1] = leaves[1].float()
    wide = [t.double() for t in leaves]
    with interpreter():
        for i in range(5):
            one = [t.detach().clone().requires_grad_(n == i) for n, t in enumerate(leaves)]
            (found,) = torch.autograd.grad(
                gef.grouped_expert_ffn(one[0], experts, *one[1:], impl="triton").sum(), one[i]
            )
            one = [t.clone().requires_grad_(n == i) for n, t in enumerate(wide)]
            (wanted,) = torch.autograd.grad(masked(one[0], experts, *one[1:], "silu").sum(), one[i])
            assert found.dtype == leaves[i].dtype and relative_error(found, wanted) < 2e-2
        out = gef.grouped_expert_ffn(leaves[0], experts, *leaves[1:], impl="triton")
        assert not out.requires_grad and out.dtype == torch.bfloat16
        x = leaves[0].clone().requires_grad_()
        careless = OPERATOR(x, experts, *leaves[1:], 0, False, 0)[0]
        with pytest.raises(RuntimeError, match="save"):
            careless.sum().backward()


@needs_triton
def test_the_layer_of_a_decoder_gives_the_same_gradients():
    torch.manual_seed(0)
    model = MixtureOfExperts(8, 6, 4, 2)
    x = torch.randn(2, 5, 8, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    up, gate, down = (
        torch.stack([getattr(e, name).weight for e in model.experts]) for name in ("up", "gate", "down")
    )
    weights, experts = model.route(x)
    with interpreter():
        y = gef.grouped_expert_ffn(x, experts, weights, up, down, gate, impl="triton")
        found = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(y, model(x))
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w)


def test_tiles_cover_all_rows_of_all_experts_once():
    g = torch.Generator().manual_seed(0)
    for assignments, count, rows in ((0, 3, 16), (1, 1, 16), (100, 7, 16), (33, 40, 16), (257, 2, 128)):
        key = torch.randint(0, count + 1, (assignments,), generator=g).sort().values  # count: unused
        start = torch.searchsorted(key, torch.arange(count + 1)).int()
        expert, first, last = gef.cut_tiles(start, assignments, rows)
        seen = torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in zip(first, last) if a < b)])
        assert torch.equal(seen.sort().values, torch.arange(int((key < count).sum())))
        for e, a, b in zip(expert, first, last):
            assert b - a <= rows and (key[a:b] == e).all()


@needs_triton
def test_opcheck():
    experts, leaves = layer(3, 5, 4, 6, 2, 2, 4)
    experts = experts.clamp(min=0)  # what is kept for unused slots is never written, and so never the same
    with interpreter():
        for weights, gate in ((leaves[1], leaves[4]), (None, None)):
            inputs = [leaves[0], weights, *leaves[2:4], gate]
            inputs = [None if t is None else t.requires_grad_() for t in inputs]
            arguments = (inputs[0], experts, *inputs[1:], 0, True, 0)
            tests = ("test_schema", "test_faketensor", "test_autograd_registration")
            tests += ("test_aot_dispatch_dynamic",) if gate is not None else ()
            result = torch.library.opcheck(OPERATOR.default, arguments, test_utils=tests)
            assert set(result.values()) == {"SUCCESS"} and len(result) == len(tests)
        plain = [t.detach() for t in leaves]
        out, *saved = OPERATOR(plain[0], experts, *plain[1:], 0, True, 0)
        for want in ([True] * 5, [False, True, False, True, False]):
            arguments = (out, plain[0], *plain[1:], *saved, 0, 2, want, 0)
            backward = torch.ops.paperbench.grouped_expert_ffn_backward.default
            result = torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))
            assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck_of_the_reference(dense):
    experts, leaves = layer(3, 2, 2, 2, 2, 2, 5, torch.float64)
    leaves = [t.requires_grad_() for t in leaves]

    def outputs(x, weights, up, down, gate):
        return gef.grouped_expert_ffn_reference(x, experts, weights, up, down, gate, dense=dense)

    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)
    torch.testing.assert_close(outputs(*leaves), masked(leaves[0], experts, *leaves[1:], "silu"))


def test_one_graph_through_the_reference():
    experts, leaves = layer(5, 3, 4, 3, 2, 2, 6)
    leaves = [t.requires_grad_() for t in leaves]

    def call(x, weights, up, down, gate):
        return gef.grouped_expert_ffn(x, experts, weights, up, down, gate, activation="gelu")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(fn(*leaves).sum(), leaves) for fn in (compiled, call)]
    for found, wanted in zip(*gradients):
        torch.testing.assert_close(found, wanted)


@needs_triton
def test_the_operator_does_not_break_the_graph():
    experts, leaves = layer(4, 3, 2, 3, 2, 2, 7)

    def call(x, *rest):
        return gef.grouped_expert_ffn(2 * x, experts, *rest, impl="triton") + 1

    found, code = compiled_graph(call, *leaves)
    assert "paperbench.grouped_expert_ffn" in code
    torch.testing.assert_close(found, masked(2 * leaves[0], experts, *leaves[1:], "silu") + 1)


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles(target, compile_sample):
    def chosen(c):
        return c.labels["use"] in ("up, gate", "sum") and c.dtype == torch.float16

    compile_sample(gef.configurations((target,)), chosen, 2)


def test_benchmark_runs_on_a_cpu():
    shapes = ((20, 16, 8, 4, 2), (3, 16, 8, 2, 1))
    found = gef.benchmark("cpu", shapes=shapes, dtype=torch.bfloat16, compiled=False, rounds=2, peak_size=32)
    assert set(found["parity"]) == {"output", "x", "weights", "up", "down", "gate"}
    assert max(found["parity"].values()) < 2e-2
    timed = [row for row in found["rows"] if "skipped" not in row]
    assert len(found["rows"]) == 8 and {"kernel", "loop"} <= {row["competitor"] for row in timed}
    assert all(row["forward"]["median"] > 0 and row["share of matrix peak"] > 0 for row in timed)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this version of PyTorch has no grouped_mm")
def test_the_peer_computes_the_same():
    experts, leaves = layer(20, 16, 16, 16, 3, 2, 8, torch.bfloat16)
    found = gef._grouped_mm_ffn(leaves[0], experts.clamp(min=0), *leaves[1:])
    wide = [t.double() for t in leaves]
    assert relative_error(found, masked(wide[0], experts.clamp(min=0), *wide[1:], "silu")) < 2e-2
