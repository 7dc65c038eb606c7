"""What is said of the blocks is what a recount of the block tables finds, whatever happens."""

from __future__ import annotations

import pytest

from scheduler_svc.core.config import CoreConfig
from scheduler_svc.snapshot import snapshot_of
from tests.property.test_core import World, random_prompt
from tests.support.accounting import recount, tokens_ahead


@pytest.mark.parametrize("depth, horizon_us", [(1, 0), (2, 0), (3, 4000)])
@pytest.mark.parametrize("blocks, block_size", [(30, 4), (200, 16)])
def test_memory_is_what_the_tables_hold(depth: int, horizon_us: int, blocks: int, block_size: int) -> None:
    """Samples that share, prefixes that are hit, preemptions, deaths: after each event, each plan."""
    config = CoreConfig(max_inflight=depth, horizon_us=horizon_us)
    world = World(depth, config, blocks=blocks, block_size=block_size, slots=12, budget=60)
    choose = world.random
    shared = [[choose.randrange(50) for _ in range(40)] for _ in range(3)]
    world.attach("w")
    seen_shared = seen_ahead = 0
    for _ in range(1500):
        action = choose.random()
        if action < 0.08:
            world.arrive(random_prompt(world, shared), choose.choice((1, 2, 4)), choose.choice((2, 20, 60)))
        elif action < 0.083:
            world.lose("w")
            world.attach("w")
        elif action < 0.6:
            world.plan("w")
        else:
            world.answer("w")
        worker = world.core.workers["w"]
        memory, num_shared = recount(worker)
        assert worker.memory() == memory
        (view,) = snapshot_of(world.core, world.now, False, False, 0).workers
        assert view.num_blocks - view.num_free_blocks - view.num_cached_blocks == memory.held
        assert view.num_shared_blocks == num_shared
        assert view.num_lookahead_blocks == memory.lookahead
        if memory.held:
            assert view.kv_waste_ratio == memory.unused_slots / (memory.held * block_size)
            saved = memory.references - memory.held
            assert view.kv_sharing_ratio == pytest.approx(saved / memory.references)
        limit = config.max_inflight * (world.sizes.get("horizon", 4) if horizon_us else 1)
        assert all(ahead < limit for ahead in tokens_ahead(worker)), "more ahead than steps in flight draw"
        seen_shared += num_shared
        seen_ahead += memory.lookahead
    assert seen_shared and (seen_ahead or depth == 1), "nothing was shared or held ahead: the test is idle"
