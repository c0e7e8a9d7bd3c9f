"""A step's inputs: what is uploaded and what recorded steps read are what the plan says, and padding harms nobody."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardray.runtime.engine.inputs import (
    LAST_TOKEN,
    DecodeShape,
    Layout,
    StaticInputs,
    StepInputs,
    decode_sizes,
    upload,
)
from shardray.runtime.engine.recorded import RecordedStep, RecordedSteps, StepOutput
from shardray.runtime.engine.slots import SlotTable
from shardray.runtime.engine.step import PageGrant, Row, StepPlan
from shardray.runtime.model.kernels.splits import decode_splits

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_SLOTS, MAX_LEN, NUM_PAGES = 4, 9, 48, 100
SCRATCH_PAGE = NUM_PAGES
NUM_BASIC = StepInputs._fields.index("splits")  # inputs that every device has


def slot_table(pages: dict[int, list[int]]) -> SlotTable:
    slots = SlotTable(NUM_SLOTS, MAX_LEN, BLOCK_SIZE, CPU)
    slots.grant([PageGrant(slot, 0, tuple(own)) for slot, own in pages.items()])
    return slots


@st.composite
def decode_plans(draw: st.DrawFn) -> tuple[dict[int, list[int]], StepPlan]:
    """Rows of one token each, on pages of their own; some know their token, some leave it to the device."""
    slots = draw(st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=NUM_SLOTS, unique=True))
    pool = draw(st.permutations(range(NUM_PAGES)))
    rows, pages = [], {}
    for slot in slots:
        start = draw(st.integers(0, MAX_LEN - 1))
        pages[slot] = [pool.pop() for _ in range(start // BLOCK_SIZE + 1)]
        rows.append(Row(slot, start, draw(st.sampled_from([(), (7,), (11,)])), True))
    return pages, StepPlan(0, (), (), tuple(rows))


@settings(max_examples=80)
@given(st.lists(decode_plans(), min_size=1, max_size=4))
def test_static_inputs_hold_the_step_and_padding_that_touches_only_the_scratch_page(
    plans: list[tuple[dict[int, list[int]], StepPlan]],
) -> None:
    max_blocks = MAX_LEN // BLOCK_SIZE
    shape = DecodeShape(NUM_SLOTS, max_blocks, BLOCK_SIZE, SCRATCH_PAGE, scratch_slot=NUM_SLOTS)
    static = StaticInputs(shape, CPU, num_buffers=2)
    for pages, plan in plans:
        laid_out = slot_table(pages).lay_out(plan)
        assert laid_out.is_decode
        static.fill(laid_out.inputs)
        count, found = len(plan.rows), static.tensors
        for tensor, array in zip(found[:NUM_BASIC], laid_out.inputs[:NUM_BASIC], strict=True):
            own = tensor[(slice(count), *map(slice, array.shape[1:]))]
            assert own.tolist() == array.tolist()
        assert found.slots[count:].tolist() == [NUM_SLOTS] * (NUM_SLOTS - count)
        assert found.context_lens[count:].tolist() == [1] * (NUM_SLOTS - count)
        assert (found.cache_index[count:] // BLOCK_SIZE == SCRATCH_PAGE).all()
        assert (found.block_tables[count:] == SCRATCH_PAGE).all()
        assert found.sampled_tokens.tolist() == list(range(NUM_SLOTS))
        read = {int(page) for row in found.block_tables[:count] for page in row}
        assert read <= {*range(NUM_PAGES), SCRATCH_PAGE}  # columns past a row's end name pages that there are


@settings(max_examples=80)
@given(decode_plans(), st.booleans())
def test_decodes_are_laid_out_as_rows_of_any_length_are(
    drawn: tuple[dict[int, list[int]], StepPlan], has_tasks: bool
) -> None:
    pages, plan = drawn
    slots = slot_table(pages)
    slots.has_tasks = has_tasks
    found, expected = slots.lay_out(plan), slots._lay_out_rows(plan)
    assert found.is_decode
    assert expected.is_decode
    for name, array, other in zip(StepInputs._fields, found.inputs, expected.inputs, strict=True):
        if array is None or other is None:
            assert array is other
            assert not has_tasks
            continue
        assert (name, array.dtype, array.tolist()) == (name, other.dtype, other.tolist())
        assert array.flags.c_contiguous


@settings(max_examples=60)
@given(st.lists(decode_plans(), min_size=1, max_size=3))
def test_tasks_of_recorded_rows_are_those_of_the_step_and_rows_that_fill_up_have_none(
    plans: list[tuple[dict[int, list[int]], StepPlan]],
) -> None:
    shape = DecodeShape(NUM_SLOTS + 2, MAX_LEN // BLOCK_SIZE, BLOCK_SIZE, SCRATCH_PAGE, NUM_SLOTS, has_tasks=True)
    static = StaticInputs(shape, CPU, num_buffers=2)
    for pages, plan in plans:
        slots = slot_table(pages)
        slots.has_tasks = True
        laid_out = slots.lay_out(plan)
        static.fill(laid_out.inputs)
        tasks = slots.as_view(static.tensors).tasks
        assert tasks is not None
        splits, starts = decode_splits(static.tensors.context_lens.numpy())
        assert tasks.splits[: len(splits)].tolist() == splits.tolist()
        assert tasks.split_starts.tolist() == starts.tolist()
        assert static.tensors.context_lens[len(plan.rows) :].tolist() == [0] * (NUM_SLOTS + 2 - len(plan.rows))
        assert tasks.tiles.shape == (0, 2)
        counts = [1] * len(plan.rows) + [0] * (NUM_SLOTS + 2 - len(plan.rows))
        assert tasks.query_starts.tolist() == [0, *np.cumsum(counts).tolist()]


def test_contexts_that_share_more_pages_than_there_are_run_operation_by_operation() -> None:
    block_size, num_rows = 64, 8
    shape = DecodeShape(num_rows, 64, block_size, 70, num_rows, has_tasks=True)
    step = RecordedStep(StaticInputs(shape, CPU, num_buffers=2), None, lambda: StepOutput(None, torch.arange(num_rows)))
    for num_shared, runs in ((4, True), (60, False)):
        slots = SlotTable(num_rows, 64 * block_size, block_size, CPU)
        slots.has_tasks = True
        shared = tuple(range(num_shared))
        slots.grant([PageGrant(slot, 0, (*shared, num_shared + slot)) for slot in range(num_rows)])
        rows = tuple(Row(slot, num_shared * block_size, (3,), True) for slot in range(num_rows))
        plan = StepPlan(0, (), (), rows)
        found = RecordedSteps({num_rows: step}).run(plan, partial(slots.lay_out, plan), None)
        assert (found is not None) == runs


@settings(max_examples=80)
@given(st.data())
def test_a_laid_out_plan_says_where_every_token_stands(data: st.DataObject) -> None:
    pages, plan = data.draw(decode_plans())
    longer = data.draw(st.lists(st.integers(2, BLOCK_SIZE), max_size=len(plan.rows)))
    rows = [
        Row(row.slot, row.start, tuple(range(count)) if row.start + count <= MAX_LEN else row.token_ids, count % 2 == 0)
        for row, count in zip(plan.rows, [*longer, *(1 for _ in plan.rows[len(longer) :])], strict=True)
    ]
    for row in rows:
        free = [page for page in range(NUM_PAGES) if all(page not in own for own in pages.values())]
        pages[row.slot] += free[: -(-(row.start + row.num_tokens) // BLOCK_SIZE) - len(pages[row.slot])]
    inputs = slot_table(pages).lay_out(StepPlan(0, (), (), tuple(rows))).inputs
    ordered = sorted(rows, key=lambda row: row.num_tokens > 1)
    places = [(row, i) for row in ordered for i in range(row.num_tokens)]
    assert inputs.token_ids.tolist() == [(row.token_ids or (LAST_TOKEN,))[i] for row, i in places]
    assert inputs.positions.tolist() == [row.start + i for row, i in places]
    for (row, i), index in zip(places, inputs.cache_index.tolist(), strict=True):
        block, offset = divmod(row.start + i, BLOCK_SIZE)
        assert index == pages[row.slot][block] * BLOCK_SIZE + offset
    assert inputs.context_lens.tolist() == [row.start + row.num_tokens for row in ordered]
    ends = {
        row.slot: int(end) for row, end in zip(ordered, np.cumsum([row.num_tokens for row in ordered]), strict=True)
    }
    sampling = [row.slot for row in rows if row.samples]
    assert inputs.sampling_slots.tolist() == sampling
    assert inputs.sampled_tokens.tolist() == [ends[slot] - 1 for slot in sampling]


def test_a_row_without_a_token_reads_what_its_slot_sampled_last() -> None:
    slots = slot_table({slot: [slot] for slot in range(4)})
    slots.set_last_tokens(torch.tensor([2, 0]), torch.tensor([50, 60]))
    rows = (Row(3, 1, (5,), True), Row(0, 1, (), True), Row(1, 0, (8, 9, 10), True), Row(2, 2, (), True))
    laid_out = slots.lay_out(StepPlan(0, (), (), rows))
    view = slots.as_view(upload(laid_out.inputs, CPU), laid_out)
    assert view.token_ids.tolist() == [5, 60, 50, 8, 9, 10]
    assert (view.num_decodes, len(view.prefills), laid_out.is_decode) == (3, 1, False)


@given(st.integers(0, 5), st.integers(0, 7))
def test_arrays_laid_out_in_one_buffer_do_not_touch_one_another(num_rows: int, num_blocks: int) -> None:
    arrays = StepInputs(
        *(np.full(num_rows + i, i) for i in range(4)),
        np.full(num_rows, 4, np.int32),
        *(np.full(num_rows, i) for i in (5, 6)),
        np.full((num_rows, num_blocks), 7, np.int32),
    )
    layout = Layout(arrays)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for target, array in zip(layout.arrays(buffer)[:NUM_BASIC], arrays[:NUM_BASIC], strict=True):
        target[...] = array
    for tensor, array in zip(layout.tensors(buffer)[:NUM_BASIC], arrays[:NUM_BASIC], strict=True):
        assert tensor.tolist() == array.tolist()
        assert tensor.numpy().dtype == array.dtype


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8, 20, 64, 200, 1000])
def test_every_number_of_rows_has_a_size_that_is_not_much_larger(max_rows: int) -> None:
    sizes = decode_sizes(max_rows)
    assert sizes[-1] == max_rows
    assert list(sizes) == sorted(set(sizes))
    for rows in range(1, max_rows + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows <= max(3, rows // 2, 7)
    assert len(sizes) <= 16 + max_rows // 32
