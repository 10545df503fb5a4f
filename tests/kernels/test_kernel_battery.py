"""What every kernel must pass without a GPU, over random inputs, and what crosses the kernel notebooks."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import compiled_graph, laid_out, needs_triton, patient

from paperbench.kernels import core
from paperbench.kernels import linear_attention as la
from paperbench.kernels.core import interpreter, read_results, relative_error

NOTEBOOKS = Path(__file__).parents[2] / "nbs" / "kernels"
BOUNDS = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
OPERATOR = torch.ops.paperbench.linear_attention


def leaves_of(sizes, dtype, state, seed, magnitude=1.0):
    """Positive features, centred values and where asked a state; float64 numbers rounded to the dtype."""
    batch, heads, length, key_dim, value_dim = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    q, k = ((draw(batch, heads, length, key_dim) + 0.1).to(dtype) for _ in range(2))
    v = (magnitude * (2 * draw(batch, heads, length, value_dim) - 1)).to(dtype)
    if not state:
        return [q, k, v]
    return [
        q,
        k,
        v,
        (magnitude * draw(batch, heads, key_dim, value_dim)).float(),
        draw(batch, heads, key_dim).float() + 0.1,
    ]


def errors_of(leaves, normalise=True, span_tokens=0, layout="plain", seed=0):
    """Relative errors of the outputs and all gradients of the kernel, against the float64 reference.

    The division makes a gradient the difference of two parts, which may cancel: with one feature the queries
        drop out of
    the quotient and their gradient is zero. Rounding is relative to the parts, so that is what errors are
    compared with.
    """
    exact = [x.double().requires_grad_() for x in leaves]
    start = tuple(exact[3:]) or None
    out, end = la.linear_attention_reference(
        *exact[:3], normalise=normalise, initial_state=start, return_state=True
    )
    results = [out, *end]
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in results]
    grads[0] = grads[0].to(leaves[0].dtype).double()
    expected = torch.autograd.grad(results, exact, grads)
    part, end = la.linear_attention_reference(
        *exact[:3], normalise=False, initial_state=start, return_state=True
    )
    if normalise:
        ones = torch.ones_like(out[..., :1])
        ones_state = (exact[4][..., None], exact[4]) if start else None
        part = (
            part
            / (
                la.linear_attention_reference(*exact[:2], ones, normalise=False, initial_state=ones_state)
                + 1e-6
            ).detach()
        )
    parts = torch.autograd.grad([part, *end], exact, grads, allow_unused=True, materialize_grads=True)
    ours_in = [
        laid_out(x, layout).requires_grad_() if i < 3 else x.clone().requires_grad_()
        for i, x in enumerate(leaves)
    ]
    with interpreter():
        s, z = ours_in[3:] or (None, None)
        ours = OPERATOR(*ours_in[:3], s, z, normalise, 1e-6, span_tokens)[:3]
        found = torch.autograd.grad(
            ours, ours_in, [laid_out(g.to(x.dtype), layout) for g, x in zip(grads, ours)]
        )
    assert all(x.dtype == y.dtype and x.shape == y.shape for x, y in zip(found, ours_in))
    names = ["out", "S", "z", "dq", "dk", "dv", "dS", "dz"]
    errors = {}
    for name, x, y, size in zip(names, [*ours, *found], [*results, *expected], [*results, *parts]):
        own, largest = y.detach().norm().item(), max(y.detach().norm().item(), size.detach().norm().item())
        errors[name] = relative_error(x, y) * (own or 1.0) / (largest or 1.0)
    return errors


@needs_triton
@patient(10)
@given(
    sizes=st.tuples(
        st.integers(1, 2),
        st.integers(1, 2),
        st.sampled_from([1, 2, 7, 16, 17, 31, 64, 65, 97]),
        st.sampled_from([1, 3, 16, 31, 33]),
        st.sampled_from([1, 5, 16, 37]),
    ),
    dtype=st.sampled_from(list(BOUNDS)),
    state=st.booleans(),
    normalise=st.booleans(),
    span_tokens=st.sampled_from([0, 64]),
    layout=st.sampled_from(["plain", "tokens first", "every other", "odd slice"]),
    seed=st.integers(0, 2**16),
)
def test_linear_attention_over_random_inputs(sizes, dtype, state, normalise, span_tokens, layout, seed):
    errors = errors_of(leaves_of(sizes, dtype, state, seed), normalise, span_tokens, layout, seed)
    assert max(errors.values()) < BOUNDS[dtype], errors


@needs_triton
@pytest.mark.parametrize(
    "sizes, dtype", [((1, 1, 18, 70, 66), torch.float32), ((1, 1, 66, 130, 129), torch.bfloat16)]
)
def test_features_wider_than_a_block(sizes, dtype):
    errors = errors_of(leaves_of(sizes, dtype, True, 0), span_tokens=64)
    assert max(errors.values()) < BOUNDS[dtype], errors


@needs_triton
@pytest.mark.parametrize("layout", ["plain", "tokens first", "every other", "odd slice"])
def test_launches_ask_only_for_what_was_compiled(layout, monkeypatch):
    """Every pointer and stride is divisible by 16, every compile-time argument is one of the report's."""
    known = {(c.kernel, *sorted(map(str, c.constants.items()))) for c in la.configurations(("sm_80",))}
    seen = []

    def check(kernel, programs, *args, num_warps=4, num_stages=2, **constants):
        for name, value in zip(kernel.arg_names, args):
            if name.endswith("_ptr"):
                assert value.data_ptr() % 16 == 0, name
            elif name.startswith("stride_") or name in ("K", "V", "rows", "cols"):
                assert value % 16 == 0, name
        assert (kernel, *sorted(map(str, constants.items()))) in known, constants
        seen.append(kernel)
        core.launch(kernel, programs, *args, num_warps=num_warps, num_stages=num_stages, **constants)

    monkeypatch.setattr(la, "launch", check)
    errors_of(leaves_of((1, 2, 65, 5, 19), torch.bfloat16, True, 0), span_tokens=64, layout=layout)
    assert set(seen) == {
        la.span_state_kernel,
        la.span_prefix_kernel,
        la.chunk_scan_kernel,
        la.row_terms_kernel,
    }


@needs_triton
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_extreme_values(magnitude):
    errors = errors_of(leaves_of((1, 1, 20, 3, 4), torch.float32, False, 0, magnitude))
    assert max(errors.values()) < BOUNDS[torch.float32], errors


@needs_triton
def test_infinities_stay_where_they_belong():
    q, k, v = leaves_of((1, 1, 40, 3, 4), torch.float32, False, 0)
    v[0, 0, 32, 1] = torch.inf  # third chunk of 16 tokens
    with interpreter():
        out = la.linear_attention(q, k, v, impl="triton")
    assert torch.isfinite(out[:, :, :32]).all() and torch.isfinite(out[..., 0]).all()
    assert torch.isinf(out[0, 0, 32, 1]) and not torch.isfinite(out[0, 0, 33:, 1]).any()


@needs_triton
def test_the_future_does_not_matter():
    q, k, v = leaves_of((1, 1, 70, 3, 4), torch.float32, False, 0)
    with interpreter():
        before = OPERATOR(q, k, v, None, None, True, 1e-6, 64)[0]
        for token in (5, 63, 64):
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[:, :, token:] = 2 * x[:, :, token:] + 1
            after = OPERATOR(*changed, None, None, True, 1e-6, 64)[0]
            assert torch.equal(after[:, :, :token], before[:, :, :token])
            assert not torch.equal(after[:, :, token], before[:, :, token])


@needs_triton
@pytest.mark.parametrize("broken", ["zeros", "only the state"])
def test_gradients_that_autograd_leaves_out(broken):
    q, k, v = (x.requires_grad_() for x in leaves_of((1, 1, 20, 3, 4), torch.float32, False, 0))
    with interpreter():
        out, (s, z) = la.linear_attention(q, k, v, impl="triton", return_state=True)
        if broken == "zeros":
            found = torch.autograd.grad(out.sum(), (q, k, v))  # an expanded gradient: all strides are zero
            expected = torch.autograd.grad(la.linear_attention_reference(q, k, v).sum(), (q, k, v))
        else:
            found = torch.autograd.grad(s.square().sum() + z.sum(), (q, k, v))
            s_, z_ = la.linear_attention_reference(q, k, v, return_state=True)[1]
            expected = torch.autograd.grad(s_.square().sum() + z_.sum(), (q, k, v), materialize_grads=True)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@needs_triton
def test_opcheck_with_every_utility():
    leaves = [x.requires_grad_() for x in leaves_of((1, 1, 3, 2, 2), torch.float32, True, 0)]
    with interpreter():
        result = torch.library.opcheck(OPERATOR.default, (*leaves, True, 1e-6, 0))
        assert set(result.values()) == {"SUCCESS"} and len(result) >= 4
        q, k, v, s, z = (x.detach() for x in leaves)
        out, _, _, denominator = OPERATOR(q, k, v, s, z, True, 1e-6, 0)
        backward = torch.ops.paperbench.linear_attention_backward.default
        result = torch.library.opcheck(
            backward,
            (out, None, z, q, k, v, s, z, out, denominator, True, 0),
            test_utils=("test_schema", "test_faketensor"),
        )
        assert set(result.values()) == {"SUCCESS"}


def test_one_graph_through_the_reference():
    q, k, v = (x.requires_grad_() for x in leaves_of((1, 2, 6, 3, 2), torch.float32, False, 0))
    compiled = torch.compile(
        lambda q, k, v: la.linear_attention(q, k, v), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v), la.linear_attention(q, k, v))
    (ours,) = torch.autograd.grad(compiled(q, k, v).square().sum(), k)
    (expected,) = torch.autograd.grad(la.linear_attention(q, k, v).square().sum(), k)
    torch.testing.assert_close(ours, expected)


@needs_triton
def test_the_operator_does_not_break_the_graph():
    q, k, v = (x.requires_grad_() for x in leaves_of((1, 1, 5, 3, 2), torch.float32, False, 0))
    def model(q, k, v):
        return 2 * OPERATOR(q + 1, k, v, None, None, True, 1e-6, 0)[0]

    found, code = compiled_graph(model, q, k, v)
    assert "paperbench.linear_attention" in code
    with interpreter():
        expected = model(q, k, v)
        torch.testing.assert_close(found, expected)
        for x, y in zip(
            torch.autograd.grad(found.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v))
        ):
            torch.testing.assert_close(x, y)


def test_import_and_reference_without_triton(run_python):
    printed = run_python("""
import sys
sys.modules["triton"] = None  # as on a machine where it is not installed
import torch
from paperbench.kernels.linear_attention import linear_attention
x = torch.rand(1, 1, 4, 2)
print(linear_attention(x, x, x).shape)
for attempt in (lambda: linear_attention(x, x, x, impl="triton"),
                lambda: torch.ops.paperbench.linear_attention(x, x, x, None, None, True, 1e-6, 0)):
    try:
        attempt()
    except RuntimeError as error:
        print(error)
""")
    assert (
        printed.count("needs Triton, which is not installed") == 2 and "torch.Size([1, 1, 4, 2])" in printed
    )


@needs_triton
def test_tritons_own_switch_works_too(run_python):
    printed = run_python(
        """
import torch
from paperbench.kernels.core import relative_error
from paperbench.kernels.linear_attention import linear_attention
q, k, v = torch.rand(3, 1, 2, 20, 3)
print(relative_error(linear_attention(q, k, v, impl="triton"), linear_attention(q, k, v, impl="torch")) <
1e-5)
""",
        TRITON_INTERPRET="1",
    )
    assert printed.strip() == "True"


@needs_triton
def test_the_compile_report_is_complete_and_clean():
    if not NOTEBOOKS.exists():
        pytest.skip("the report lies beside the notebook, which is not part of the package")
    report = read_results(NOTEBOOKS / "linear_attention_compiled.json")
    assert report["fingerprint"] == la.fingerprint(), "the kernels have changed: write compile_all() again"
    names = ("label", "dtype", "width", "partial", "target", "warps", "stages")
    wanted = {
        (
            c.labels["label"],
            str(c.dtype).removeprefix("torch."),
            c.labels["width"],
            c.labels["partial"],
            c.target,
            c.num_warps,
            c.num_stages,
        )
        for c in la.configurations()
    }
    assert {tuple(row[n] for n in names) for row in report["rows"]} == wanted
    for row in report["rows"]:
        target = core.TARGETS[row["target"]]
        assert row["spill_bytes"] == 0 and row["registers"] <= target.register_limit, row
        assert row["shared_bytes"] <= target.shared_limit and row["fits"], row


@needs_triton
@pytest.mark.parametrize("target", list(core.TARGETS))
def test_a_sample_compiles_as_reported(target):
    everything = os.environ.get("PAPERBENCH_COMPILE_ALL") == "1"
    report = read_results(NOTEBOOKS / "linear_attention_compiled.json") if NOTEBOOKS.exists() else None
    found = la.configurations((target,))
    if not everything:
        found = [
            c for c in found if (c.labels["label"], c.dtype, c.labels["width"], c.labels["partial"]) == ("out", torch.float16, 128, False)
        ]
    assert found
    for configuration in found:
        row = core.compile_configuration(configuration)
        assert row["fits"], row
        if report and report["triton"] == core.triton.__version__:
            assert row in report["rows"]


def test_the_choice_of_tiles_and_spans_keeps_its_promises():
    for target in core.TARGETS:
        for dtype in core.KERNEL_DTYPES:
            for width in (1, 16, 17, 64, 65, 128, 1000):
                tile = la.choose_tile(dtype, width, target)
                assert la.SPAN_QUANTUM % tile.chunk == 0 and 16 <= tile.block_k <= 128
                assert tile.block_k >= min(width, la.MAX_BLOCK[dtype])
    with pytest.raises(ValueError, match="got 'sm_70'"):
        la.choose_tile(torch.float32, 4, "sm_70")
    with pytest.raises(ValueError, match="got torch.float64"):
        la.choose_tile(torch.float64, 4, "sm_80")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    length=st.integers(0, 10**6),
    heads=st.integers(0, 4096),
    blocks=st.integers(1, 8),
    processors=st.integers(1, 304),
)
def test_spans_cover_the_sequence(length, heads, blocks, processors):
    span = la.choose_span(length, heads, blocks, processors)
    spans = -(-length // span)
    assert span > 0 and span % la.SPAN_QUANTUM == 0
    assert spans <= 1 or span >= la.MIN_SPAN  # short spans only where one span is all there is
    assert spans <= 1 or heads * blocks * spans <= 2 * processors


def test_benchmark_runs_on_a_cpu():
    found = la.benchmark(
        "cpu",
        lengths=(8, 40),
        batch=1,
        heads=2,
        key_dim=4,
        value_dim=3,
        dtype=torch.float32,
        compiled=False,
        rounds=2,
        quadratic_limit=16,
    )
    assert max(found["parity"].values()) < 1e-5 and found["environment"]["torch"] == torch.__version__
    timed = [row for row in found["rows"] if "skipped" not in row]
    assert len(found["rows"]) == 6 and len(timed) == 5
    assert all(row["forward"]["median"] > 0 and row["forward and backward"]["median"] > 0 for row in timed)
    kernel = [row for row in timed if row["competitor"] == "kernel"]
    assert all(row["share of bandwidth"] > 0 and row["share of peak"] > 0 for row in kernel)
