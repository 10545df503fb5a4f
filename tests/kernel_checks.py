"""What the batteries of the kernels share: layouts in memory, settings for slow examples, and the compiler's graph."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from paperbench.kernels.core import HAS_TRITON, interpreter

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
LAYOUTS = ("plain", "transposed", "every other", "slice", "strided")


def laid_out(x, layout):
    """The same numbers over another layout of the last two dimensions, with NaN in between."""
    if layout == "plain":
        return x
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "every other":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
    if layout == "slice":
        padded = torch.nn.functional.pad(x, (8, 24, 1, 4), value=torch.nan)
        return padded[..., 1 : 1 + x.shape[-2], 8 : 8 + x.shape[-1]]
    if layout == "odd slice":  # rows that begin at odd addresses
        padded = torch.nn.functional.pad(x, (3, 2, 1, 4), value=torch.nan)
        return padded[..., 1 : 1 + x.shape[-2], 3 : 3 + x.shape[-1]]
    if layout == "strided":  # rows that kernels may read in place
        return torch.nn.functional.pad(x, (0, 32 - x.shape[-1] % 16), value=torch.nan)[..., : x.shape[-1]]
    if layout == "tokens first":  # (B, N, H, D) transposed, the layout of most models
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    raise ValueError(f"unknown layout {layout!r}")


def patient(max_examples):
    """Settings for drawn examples in the interpreter: few, the same in every run, no shrinking, which is slow."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
    )


def compiled_graph(fn, *inputs):
    """Result of a function compiled in one graph and run in the interpreter, and the graph's code."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    with interpreter():
        result = torch.compile(fn, fullgraph=True, backend=backend)(*inputs)
    assert len(graphs) == 1
    return result, graphs[0].code
