"""What only a device can show of the kernels for CUDA; run these and tests/kernels first on a new machine.

pytest -m gpu tests/kernels tests/gpu/test_kernels.py
"""

from __future__ import annotations

import pytest
import torch

from shardray.parallel.kernels import triton_launch
from shardray.parallel.kernels.triton_launch import runs_triton
from shardray.parallel.layers import Linear
from shardray.runtime.model.attention import AttentionTasks, KVPages, OwnHeads, PagedAttention, StepView
from shardray.runtime.model.kernels import choose_ops
from shardray.runtime.model.kernels.ops import Ops
from shardray.runtime.model.kernels.splits import SPLIT, decode_splits, max_splits
from shardray.runtime.model.spec import Attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
pytest.importorskip("triton", reason="triton is not installed")

from shardray.runtime.model.kernels.triton_ops import TritonOps  # noqa: E402

MAX_LEN, BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 4 * SPLIT, 16, 32, 8, 128


def test_a_device_gets_the_kernels() -> None:
    assert runs_triton(DEVICE)
    assert isinstance(choose_ops(DEVICE, torch.bfloat16, 1), TritonOps)


class Decodes:
    """Decodes at fixed places on the device, whose contexts change."""

    def __init__(self, num_rows: int) -> None:
        num_blocks = MAX_LEN // BLOCK_SIZE
        self.pages = KVPages(1, num_rows * num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, torch.bfloat16, DEVICE)
        self.pages.keys.normal_()
        self.pages.values.normal_()
        room = max_splits(num_rows, MAX_LEN, num_rows * MAX_LEN)
        splits, starts = (torch.zeros(*size, dtype=torch.int32, device=DEVICE) for size in ((room, 2), (num_rows + 1,)))
        nothing = torch.zeros(0, dtype=torch.int32, device=DEVICE)
        tokens = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
        self.view = StepView(
            tokens, tokens, tokens, num_rows,
            torch.randperm(num_rows * num_blocks, device=DEVICE).view(num_rows, num_blocks).int(),
            torch.zeros(num_rows, dtype=torch.int32, device=DEVICE), (), tokens,
            tasks=AttentionTasks(splits, starts, nothing.view(0, 2), nothing),
        )  # fmt: skip
        self.queries = torch.randn(num_rows, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        spec = Attention(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
        kv_of_head = tuple(head // (HEADS // KV_HEADS) for head in range(HEADS))
        self.attention = PagedAttention(spec, OwnHeads(kv_of_head, 0, HEADS), DEVICE)

    def set_contexts(self, lens: list[int]) -> None:
        tasks = self.view.tasks
        assert tasks is not None
        splits, starts = decode_splits(torch.tensor(lens).numpy())
        self.view.context_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        tasks.splits[: len(splits)].copy_(torch.from_numpy(splits))
        tasks.split_starts.copy_(torch.from_numpy(starts))

    def attend(self, ops: Ops) -> torch.Tensor:
        return ops.attend(self.attention, self.queries, self.pages, 0, self.view)


def test_a_captured_decode_follows_its_contexts() -> None:
    decodes = Decodes(4)
    decodes.set_contexts([1, 2, 3, 4])
    decodes.attend(TritonOps())  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decodes.attend(TritonOps())
    for lens in ([5, SPLIT, SPLIT + 1, MAX_LEN], [MAX_LEN] * 4, [1, 1, 1, 1], [17, 0, 300, 0]):
        decodes.set_contexts(lens)
        graph.replay()
        for row, length in enumerate(lens):
            if length == 0:
                assert not out[row].any()
        expected = decodes.attend(TritonOps())
        assert torch.equal(out, expected)
        if all(lens):
            torch.testing.assert_close(out, decodes.attend(Ops()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("in_size", [576, 4096, 14_336])
def test_a_captured_product_reads_what_is_there_at_replay(in_size: int) -> None:
    weight = torch.randn(6144, in_size, dtype=torch.bfloat16, device=DEVICE) * in_size**-0.5
    x = torch.randn(2, in_size, dtype=torch.bfloat16, device=DEVICE)
    product = Linear(weight)
    product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(x)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight), rtol=2e-2, atol=2e-2)
    assert torch.equal(out[:1], product(x[:1]))


def test_kernels_that_start_early_wait_for_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of products and activations, each the next one's input, many times over."""
    weight = torch.randn(4096, 4096, dtype=torch.bfloat16, device=DEVICE) / 64
    product, ops = Linear(weight), TritonOps()

    def run() -> torch.Tensor:
        x = torch.ones(1, 4096, dtype=torch.bfloat16, device=DEVICE)
        for _ in range(200):
            x = ops.activate(product(x), "silu", gated=False) + x
        return x

    expected = run()
    monkeypatch.setattr(triton_launch, "EARLY_LAUNCH", True)
    for _ in range(5):
        assert torch.equal(run(), expected)


def test_the_highest_logit_is_the_lowest_id_among_equals() -> None:
    """As torch.argmax says of itself; the sampler relies on it."""
    scores = torch.zeros(3, 151_936, device=DEVICE)
    for row, places in enumerate(([151_935, 7, 90_000], [4096, 4095], [100_000, 131_072])):
        scores[row, places] = 1.0
    assert scores.argmax(dim=-1).tolist() == [7, 4095, 100_000]
