"""A scheduler driven by hand: every sampled token is the same, and requests differ in what a test says of them."""

from __future__ import annotations

from shardray.runtime.engine.limits import SchedulerLimits
from shardray.runtime.engine.request import EngineRequest, SamplingParams, TokenOutput
from shardray.runtime.engine.scheduler import Scheduler
from shardray.runtime.engine.step import Sampled, StepPlan, StepResult

EOS_ID, STOP_ID, PLAIN_ID = 0, 1, 7
LIMITS = SchedulerLimits(
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=256,
    block_size=4,
    num_pages=64,
    prefix_caching=False,  # prompts of one length are the same, and each is to be computed
    eos_token_ids=frozenset({EOS_ID}),
)


def add(
    scheduler: Scheduler,
    request_id: str,
    prompt_len: int = 4,
    *,
    priority: int = 0,
    generated_ids: tuple[int, ...] = (),
    max_tokens: int = 20,
    params: SamplingParams | None = None,
    prefix_scope: str = "",
) -> TokenOutput | None:
    return scheduler.add(
        EngineRequest(
            request_id=request_id,
            prompt_ids=tuple(range(100, 100 + prompt_len)),
            generated_ids=generated_ids,
            params=params or SamplingParams(max_tokens=max_tokens),
            priority=priority,
            prefix_scope=prefix_scope,
        )
    )


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan()
    assert plan is not None
    return plan


def committed(scheduler: Scheduler, plan: StepPlan, token_id: int = PLAIN_ID) -> list[TokenOutput]:
    sampled = tuple(Sampled(token_id) for row in plan.rows if row.samples)
    return scheduler.commit(StepResult(plan.step, sampled))


def stepped(scheduler: Scheduler, token_id: int = PLAIN_ID) -> list[TokenOutput]:
    return committed(scheduler, planned(scheduler), token_id)


def run_to_end(scheduler: Scheduler, token_id: int = PLAIN_ID) -> list[TokenOutput]:
    outputs = []
    while scheduler.has_work:
        outputs += stepped(scheduler, token_id)
    return outputs


def row_lens(plan: StepPlan) -> list[int]:
    return [row.num_tokens for row in plan.rows]
