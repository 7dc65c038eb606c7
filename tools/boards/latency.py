"""Latency: how long users wait, and which part of the way takes it."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.boards.panels import Panel, Query, add, frame, heat, lines, row, variable
from tools.boards.queries import buckets, mean, quantile, rate

GATEWAY = 'instance=~"$gateway"'
SHARES = (0.5, 0.9, 0.95, 0.99)


def quantiles(title: str, text: str, name: str, unit: str = "s", only: str = "", width: int = 8) -> Panel:
    """Four quantiles of a histogram and its mean."""
    asked = [Query(quantile(share, name, only=only), f"p{share * 100:g}") for share in SHARES]
    return lines(title, text, [*asked, Query(mean(name, only=only), "mean")], unit, width=width)


def clients() -> list[Panel]:
    """Latencies that the gateway measures."""
    return [
        row("As clients see it (gateway)"),
        quantiles(
            "Time to first token",
            "From a request's arrival at the gateway to its first token.",
            "time_to_first_token_seconds",
            only=GATEWAY,
        ),
        quantiles(
            "Time between tokens",
            "From one token of a stream to the next.",
            "inter_token_latency_seconds",
            only=GATEWAY,
        ),
        quantiles(
            "Whole request",
            "From a request's arrival to its last token.",
            "e2e_request_latency_seconds",
            only=GATEWAY,
        ),
        heat(
            "Time to first token, all of them",
            "Each column is a moment, each cell the requests a second whose first token took that long.",
            Query(buckets("time_to_first_token_seconds", GATEWAY), "{{le}}"),
            "s",
        ),
        heat(
            "Time between tokens, all of them",
            "Each cell is the tokens a second that came that long after the one before.",
            Query(buckets("inter_token_latency_seconds", GATEWAY), "{{le}}"),
            "s",
        ),
        quantiles(
            "Mean time of a request's tokens",
            "Each sample's own mean, so that long answers do not outweigh short ones.",
            "request_time_per_output_token_seconds",
            only=GATEWAY,
        ),
    ]


def parts() -> list[Panel]:
    """Latencies that the scheduler measures, and HTTP's answers."""
    return [
        row("Where the time goes (scheduler)"),
        lines(
            "A request's time, by part",
            "Means, stacked: waiting for admission, until the first token, and until the last one.",
            [
                Query(mean("request_queue_time_seconds"), "queue"),
                Query(mean("request_prefill_time_seconds"), "prefill"),
                Query(mean("request_decode_time_seconds"), "decode"),
            ],
            "s",
            stacked=True,
        ),
        quantiles("In the queue", "From arrival to admission.", "request_queue_time_seconds"),
        quantiles("In prefill", "From admission to the first token.", "request_prefill_time_seconds"),
        quantiles("In decode", "From the first token to the last.", "request_decode_time_seconds"),
        quantiles(
            "Prefill and decode", "From admission to the last token.", "request_inference_time_seconds"
        ),
        lines(
            "HTTP answers",
            "By status. A stream that breaks later began with 200.",
            [
                Query(
                    "sum by (status) "
                    '(rate(pagoda:http_requests_total{instance=~"$gateway"}[$__rate_interval]))',
                    "{{status}}",
                )
            ],
            "reqps",
            stacked=True,
        ),
    ]


def asked() -> list[Panel]:
    """Lengths, parameters and errors of requests."""
    return [
        row("What is asked"),
        quantiles("Length of prompts", "Tokens.", "request_prompt_tokens", "short", GATEWAY, width=6),
        lines(
            "Length of answers",
            "Tokens of all samples of a request, and the mean of max_tokens where it is given.",
            [
                *(
                    Query(quantile(share, "request_generation_tokens", only=GATEWAY), f"p{share * 100:g}")
                    for share in (0.5, 0.95)
                ),
                Query(mean("request_generation_tokens", only=GATEWAY), "mean"),
                Query(mean("request_params_max_tokens", only=GATEWAY), "max_tokens"),
            ],
            "short",
            width=6,
        ),
        lines(
            "Samples of a request",
            "n, as asked.",
            [
                Query(mean("request_params_n", only=GATEWAY), "mean"),
                Query(quantile(0.95, "request_params_n", only=GATEWAY), "p95"),
            ],
            "short",
            width=6,
        ),
        lines(
            "Errors after admission",
            "By gRPC's name of the error. There is none while all is well.",
            [Query(rate("requests_failed_total", "code", GATEWAY), "{{code}}")],
            "reqps",
            width=6,
            stacked=True,
        ),
    ]


def board() -> Dashboard:
    """The board."""
    gateways = variable(
        "gateway", "Gateway", "pagoda:http_requests_total", "instance", "Gateways, by where they are scraped."
    )
    made = frame("latency", "Latency", "How long users wait, and which part of the way takes it.", [gateways])
    return add(made, *clients(), *parts(), *asked())
