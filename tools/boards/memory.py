"""Memory and sharing: what fills the KV cache, and what sharing saves."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.boards.panels import Panel, Query, add, frame, lines, row, stat, table, variable
from tools.boards.queries import mean, quantile, rate, ratio, select, total

WORKER = 'engine=~"$worker"'


def headline() -> list[Panel]:
    """What one looks at first."""
    return [
        stat(
            "In use",
            "Blocks that requests hold, on the fullest worker. The rest is free or cached prefixes.",
            Query(total("kv_cache_usage_perc", only=WORKER, how="max"), "usage"),
            "percentunit",
            [(0.9, "orange"), (0.98, "red")],
        ),
        stat(
            "Saved by sharing",
            "Blocks that sharing saves now, of the blocks that requests refer to.",
            Query(total("kv_sharing_ratio", only=WORKER, how="max"), "sharing"),
            "percentunit",
        ),
        stat(
            "Wasted",
            "Token slots allocated and not used, of those allocated: ends of blocks, and look-ahead.",
            Query(total("kv_waste_ratio", only=WORKER, how="max"), "waste"),
            "percentunit",
        ),
        stat(
            "Found in the prefix cache",
            "Prompt tokens that need not be computed.",
            Query(ratio("prefix_cache_hits_total", "prefix_cache_queries_total"), "hits"),
            "percentunit",
        ),
        stat(
            "Preemptions per second",
            "Requests that lose their blocks to others.",
            Query(rate("num_preemptions_total"), "preemptions"),
            "short",
            [(0.1, "orange"), (1, "red")],
        ),
        stat("Waiting", "Requests in the queue.", Query(total("num_requests_waiting"), "waiting"), "short"),
    ]


def blocks() -> list[Panel]:
    """Use, sharing and waste of blocks."""
    return [
        row("Blocks"),
        lines(
            "KV cache in use",
            "Share of each worker's blocks that requests hold.",
            [Query(total("kv_cache_usage_perc", "engine", WORKER, "max"), "{{engine}}")],
            "percentunit",
            highest=1,
            width=6,
        ),
        lines(
            "Shared, and ahead",
            "Held blocks in several block tables; and those for tokens that are not known yet.",
            [
                Query(total("kv_shared_blocks", only=WORKER), "shared"),
                Query(total("kv_lookahead_blocks", only=WORKER), "ahead"),
            ],
            "short",
            width=6,
        ),
        lines(
            "Saved by sharing",
            "Samples of one prompt, and prompts that begin alike, refer to the same blocks.",
            [Query(total("kv_sharing_ratio", "engine", WORKER, "max"), "{{engine}}")],
            "percentunit",
            width=6,
        ),
        lines(
            "Wasted",
            "Token slots allocated and not used. Smaller blocks waste less and cost more.",
            [Query(total("kv_waste_ratio", "engine", WORKER, "max"), "{{engine}}")],
            "percentunit",
            width=6,
        ),
    ]


def prefixes() -> list[Panel]:
    """The prefix cache, and how large the caches are."""
    return [
        row("Prefix cache"),
        lines(
            "Prompt tokens looked up and found",
            "A prompt's full blocks are found when an earlier one began with the same tokens.",
            [
                Query(rate("prefix_cache_queries_total"), "looked up"),
                Query(rate("prefix_cache_hits_total"), "found"),
            ],
            "short",
        ),
        lines(
            "Share of prompts cached",
            "Cached prompt tokens of all prompt tokens.",
            [Query(ratio("prompt_tokens_cached_total", "prompt_tokens_total"), "cached")],
            "percentunit",
            highest=1,
        ),
        table(
            "KV caches",
            "What each worker set aside when it started.",
            Query(select("cache_config_info", WORKER), ""),
            [
                "engine",
                "block_size",
                "num_gpu_blocks",
                "num_cpu_blocks",
                "max_slots",
                "enable_prefix_caching",
            ],
        ),
    ]


def shortage() -> list[Panel]:
    """Preemptions and what they cost, and what waits."""
    return [
        row("When memory is short"),
        lines(
            "Preemptions per second",
            "Requests that lose their blocks to others. swap: their KV goes to host memory, else it is lost.",
            [Query(rate("preemptions_total", "mode"), "{{mode}}")],
            "short",
            width=6,
        ),
        lines(
            "Tokens swapped and computed again",
            "Tokens a second whose KV goes to host memory; whose KV was lost with their blocks or a worker.",
            [
                Query(rate("swapped_tokens_total"), "swapped"),
                Query(rate("recomputed_tokens_total"), "recomputed"),
            ],
            "short",
            width=6,
        ),
        lines(
            "Preemptions of a request",
            "How often a request that ended had been preempted.",
            [
                Query(mean("request_num_preemptions"), "mean"),
                Query(quantile(0.95, "request_num_preemptions"), "p95"),
            ],
            "short",
            width=6,
        ),
        lines(
            "Waiting, and for what",
            "capacity: for slots or blocks. deferred: for a worker to come back.",
            [Query(total("num_requests_waiting_by_reason", "reason"), "{{reason}}")],
            "short",
            width=6,
            stacked=True,
        ),
    ]


def board() -> Dashboard:
    """The board."""
    workers = variable("worker", "Worker", "pagoda:kv_cache_usage_perc", "engine", "Worker groups.")
    made = frame(
        "memory", "Memory and sharing", "What fills the KV cache, and what sharing saves.", [workers]
    )
    return add(made, *headline(), *blocks(), *prefixes(), *shortage())
