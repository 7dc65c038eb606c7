"""Boards, rules and alerts against live services and a real Prometheus: everything asked has an answer.

Every target of every panel, every variable and every rule is asked while requests of all kinds run, with
Grafana's variables filled in. Then a worker and the scheduler are killed, and what was zero has to show it.
"""

from __future__ import annotations

import math
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import pagoda
from pagoda.models import EMBEDDED_MODEL
from tests.support import figures
from tests.support.cluster_sched import wait_until
from tests.support.monitored import Stack, monitored
from tests.support.traffic import GREEDY, Traffic
from tools import boards, monitoring
from tools.boards import ask, draw

pytestmark = pytest.mark.timeout(600)

TRAFFIC_S = 20  # at least
WINDOW = "30s"  # what $__rate_interval stands for
# What has to have been seen before the traffic may end: it happens now and then.
HAPPENED = (
    "pagoda:num_preemptions_total > 0",
    "max_over_time(pagoda:kv_sharing_ratio[10m]) > 0",
    "max_over_time(pagoda:num_requests_waiting[10m]) > 0",
    "pagoda:requests_aborted_total > 0",
)
KINDS = {"chats", "chats_over_http", "many", "samples", "alike", "leaves", "aborts", "refused"}
RULES = Path(monitoring.CONFIG) / "rules"
LABELS_OF_SCRAPES = {"job", "instance", "tier"}
MAX_ZERO = 5
NUM_STREAMS = 6  # under which something is killed; enough of all requests to fire an alert
# Panels that are zero while all is well, and what the test does to change that.
DRIVEN = {
    ("overview", "Alerts that fire"): "a worker is killed",
    ("latency", "Errors after admission"): "the scheduler is killed under a stream",
    ("scheduler", "Gone on after a worker's death"): "a worker is killed",
}
FIRING = ("PagodaServiceDown", "PagodaNoWorkers", "PagodaWorkerLost", "PagodaRequestsFailing")
VLLM = (
    "histogram_quantile(0.99, sum by(le) "
    '(rate(vllm:e2e_request_latency_seconds_bucket{model_name="$model_name"}[$__rate_interval])))',
    'rate(vllm:e2e_request_latency_seconds_sum{model_name="$model_name"}[$__rate_interval])'
    ' / rate(vllm:e2e_request_latency_seconds_count{model_name="$model_name"}[$__rate_interval])',
    'rate(vllm:prompt_tokens_total{model_name="$model_name"}[$__rate_interval])',
    'rate(vllm:generation_tokens_total{model_name="$model_name"}[$__rate_interval])',
    "histogram_quantile(0.95, sum by(le) "
    '(rate(vllm:inter_token_latency_seconds_bucket{model_name="$model_name"}[$__rate_interval])))',
    "histogram_quantile(0.5, sum by(le) "
    '(rate(vllm:time_per_output_token_seconds_bucket{model_name="$model_name"}[$__rate_interval])))',
    'vllm:num_requests_running{model_name="$model_name"}',
    'vllm:num_requests_waiting{model_name="$model_name"}',
    "histogram_quantile(0.9, sum by(le) "
    '(rate(vllm:time_to_first_token_seconds_bucket{model_name="$model_name"}[$__rate_interval])))',
    'vllm:kv_cache_usage_perc{model_name="$model_name"}',
    'vllm:gpu_cache_usage_perc{model_name="$model_name"}',
    'sum by(le) (increase(vllm:request_prompt_tokens_bucket{model_name="$model_name"}[$__rate_interval]))',
    "sum by(le) "
    '(increase(vllm:request_generation_tokens_bucket{model_name="$model_name"}[$__rate_interval]))',
    "sum by(finished_reason) "
    '(increase(vllm:request_success_total{model_name="$model_name"}[$__rate_interval]))',
    'rate(vllm:request_queue_time_seconds_sum{model_name="$model_name"}[$__rate_interval])',
    'rate(vllm:request_decode_time_seconds_sum{model_name="$model_name"}[$__rate_interval])',
    'rate(vllm:request_prefill_time_seconds_sum{model_name="$model_name"}[$__rate_interval])',
    'max(vllm:kv_cache_usage_perc{model_name=~"$model_name", engine=~"$engine"})',
    'sum(rate(vllm:prefix_cache_hits_total{model_name=~"$model_name", engine=~"$engine"}[$__rate_interval]))'
    ' / (sum(rate(vllm:prefix_cache_queries_total{model_name=~"$model_name", engine=~"$engine"}'
    "[$__rate_interval])) > 0)",
    'sum(rate(vllm:num_preemptions_total{model_name=~"$model_name", engine=~"$engine"}[$__rate_interval]))',
    'sum(vllm:num_requests_waiting_by_reason{model_name=~"$model_name", engine=~"$engine",'
    ' reason="capacity"})',
    'count(vllm:cache_config_info{model_name=~"$model_name", engine=~"$engine"})',
)


@dataclass
class Watched:
    """A stack after traffic and faults, and when they were."""

    stack: Stack
    began: float
    calm: float  # traffic is in full flow
    ended: float = 0.0
    sent: dict[str, int] = field(default_factory=dict)
    exposed: dict[str, set[str]] = field(default_factory=dict)  # label names by sample name

    @property
    def ask(self) -> ask.Prometheus:
        """Prometheus."""
        return self.stack.prometheus

    def note_names(self) -> None:
        """Add what services export now to `exposed`."""
        for family in text_string_to_metric_families(self.stack.exposed()):
            for sample in family.samples:
                self.exposed.setdefault(sample.name, set()).update(sample.labels)


def begin_stream(stack: Stack, outcome: list[Exception | None]) -> threading.Thread:
    """A stream that has begun, in a thread. It appends how it ended: None where it ended well."""
    begun = threading.Event()

    def read() -> None:
        try:
            with (
                pagoda.Client(stack.spec.grpc_target, max_retries=0) as client,
                client.stream("Once upon a time", max_tokens=400, **GREEDY) as stream,
            ):
                for _ in stream:
                    begun.set()
            outcome.append(None)
        except pagoda.PagodaError as error:
            outcome.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    return thread


def break_things(stack: Stack) -> None:
    """Kill the worker under streams, which go on; kill the scheduler under others, which fail."""
    for program, survives in (("worker-0", True), ("scheduler", False)):
        outcome: list[Exception | None] = []
        threads = [begin_stream(stack, outcome) for _ in range(NUM_STREAMS)]
        stack.kill(program)
        for thread in threads:
            thread.join(120)
        stack.wait_ready()
        assert [error is None for error in outcome] == [survives] * NUM_STREAMS, (program, outcome)
        time.sleep(3)  # Prometheus looks each second, and its rules after that


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Traffic, then faults."""
    with monitored(tmp_path_factory.mktemp("monitored")) as stack:

        def all_up() -> bool:
            up = stack.prometheus.at("sum(up)", time.time())
            return bool(up) and up[0].points[0][1] == stack.num_services

        wait_until(all_up, 60, "every service is scraped")
        traffic = Traffic(stack.spec.http_url, stack.spec.grpc_target, stack.spec.scheduler_target)
        stop = threading.Event()

        def all_seen() -> bool:
            return traffic.sent.keys() >= KINDS and all(
                stack.prometheus.at(expr, time.time()) for expr in HAPPENED
            )

        seen = Watched(stack, began=time.time(), calm=0.0)
        with ThreadPoolExecutor(1) as thread:
            sending = thread.submit(traffic.run, stop)
            try:
                time.sleep(TRAFFIC_S)
                wait_until(lambda: all_seen() or sending.done(), 180, "requests of all kinds")
                seen.calm = time.time()
            finally:
                stop.set()
            sending.result()
        seen.sent = dict(traffic.sent)
        seen.note_names()
        break_things(stack)
        seen.ended = time.time()
        seen.note_names()
        yield seen


def test_requests_of_all_kinds_were_sent(watched: Watched) -> None:
    assert watched.sent.keys() == KINDS and all(watched.sent.values())


# ------------------------------------------------------------------------------------------- boards


def targets() -> list[Any]:
    """Every target of every panel of every board."""
    return [
        pytest.param(name, panel, target, id=f"{name}-{panel['title']}-{target['refId']}")
        for name in boards.BOARDS
        for panel in boards.panels(boards.load(name))
        for target in panel["targets"]
    ]


def variables(name: str) -> list[dict[str, Any]]:
    """A board's variables but for the choice of Prometheus."""
    found = boards.load(name)["templating"]["list"]
    assert [v["name"] for v in found if v["type"] == "datasource"] == ["datasource"]
    return [v for v in found if v["type"] != "datasource"]


def chosen(watched: Watched, name: str) -> list[dict[str, str]]:
    """Values of a board's variables: all that there is, and each first choice."""
    everything = {v["name"]: v["allValue"] for v in variables(name)}
    first = {v["name"]: re.escape(watched.ask.choices(v["query"])[0]) for v in variables(name)}
    return [everything, {key: value.replace("\\", "\\\\") for key, value in first.items()}]


def assert_answered(series: list[ask.Series], what: str) -> None:
    assert series, f"{what} has no answer"
    for one in series:
        for _, value in one.points:
            assert math.isfinite(value), f"{what}: {one.labels} is {value}"


@pytest.mark.parametrize("name", boards.BOARDS)
def test_a_board_is_what_its_module_says(name: str) -> None:
    assert (boards.FOLDER / f"{name}.json").read_text() == boards.render(name), "run `make boards`"
    ids = [panel["id"] for panel in boards.load(name)["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [pytest.param(n, v, id=f"{n}-{v['name']}") for n in boards.BOARDS for v in variables(n)],
)
def test_a_variable_offers_something(watched: Watched, name: str, wanted: dict[str, Any]) -> None:
    values = watched.ask.choices(wanted["query"])
    assert [value for value in values if value], f"${wanted['name']} of {name} offers nothing"
    check_names(watched, ask.LABEL_VALUES.sub(r"\1{\2=~\"x\"}", wanted["query"]).replace("\\", ""))


@pytest.mark.parametrize(("name", "panel", "target"), targets())
def test_a_panel_has_an_answer(
    watched: Watched, name: str, panel: dict[str, Any], target: dict[str, Any]
) -> None:
    assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    check_names(watched, target["expr"])
    for values in chosen(watched, name):
        series = watched.ask.at(ask.fill(target["expr"], values, WINDOW), watched.calm)
        assert_answered(series, target["expr"])
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert all(one.labels.get(label) for one in series), f"{label} is not a label of the answers"


@pytest.mark.parametrize("name", boards.BOARDS)
def test_a_board_can_be_drawn(watched: Watched, name: str, tmp_path: Path) -> None:
    values, *_ = chosen(watched, name)
    asked = draw.Asked(watched.ask, watched.began, watched.ended, WINDOW, values)
    draw.save(draw.picture(name, asked), tmp_path / "board.png")
    with Image.open(tmp_path / "board.png") as image:
        assert image.width == draw.WIDTH_PX and len(image.getcolors() or ()) > 10


def peak(watched: Watched, name: str, panel: dict[str, Any], start: float, end: float) -> float:
    """The highest value that a panel shows in this time; 0 where it shows none."""
    values, *_ = chosen(watched, name)
    shown = [
        value
        for target in panel["targets"]
        for one in watched.ask.over(ask.fill(target["expr"], values, WINDOW), start, end, 1)
        for _, value in one.points
        if not math.isnan(value)
    ]
    return max(shown, default=0.0)


def test_few_panels_are_zero_and_faults_change_that(watched: Watched) -> None:
    everything = [(n, panel) for n in boards.BOARDS for panel in boards.panels(boards.load(n))]
    zero = {
        (name, panel["title"])
        for name, panel in everything
        if not peak(watched, name, panel, watched.began, watched.calm) > 0
    }
    assert zero <= set(DRIVEN) and len(DRIVEN) <= MAX_ZERO, zero - set(DRIVEN)
    for name, panel in everything:
        if fault := DRIVEN.get((name, panel["title"])):
            shown = peak(watched, name, panel, watched.calm, watched.ended)
            assert shown > 0, f"{panel['title']} of {name} stays 0 though {fault}"
    figures.record("monitoring", panels=len(everything), targets=len(targets()), zero=len(zero))


# -------------------------------------------------------------------------------------------- rules


def rules() -> list[Any]:
    """Every recording and alert rule."""
    return [
        pytest.param(rule, id=rule.get("record") or rule["alert"])
        for path in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def alerts() -> list[Any]:
    return [param for param in rules() if "alert" in param.values[0]]


@pytest.mark.parametrize("rule", rules())
def test_a_rule_has_an_answer(watched: Watched, rule: dict[str, Any]) -> None:
    check_names(watched, rule["expr"])
    # An alert that does not fire has no answer: what it compares must have one. Before a comparison that
    # only keeps a ratio from dividing by 0 there is a bracket behind its number.
    compared = r"(?<=\s)(==|>|<)(?=\s[\d.]+(?!\)))"
    expr = re.sub(compared, r"\1 bool", rule["expr"]) if "alert" in rule else rule["expr"]
    assert_answered(watched.ask.at(expr, watched.calm), rule["expr"])
    if "record" in rule:
        assert_answered(watched.ask.at(rule["record"], watched.calm), rule["record"])


def test_prometheus_evaluates_every_rule(watched: Watched) -> None:
    found = [rule for group in watched.ask.get("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(rules())
    assert {rule["health"] for rule in found} == {"ok"}, [r for r in found if r["health"] != "ok"]


@pytest.mark.parametrize("alert", FIRING)
def test_an_alert_fires_for_a_fault(watched: Watched, alert: str) -> None:
    expr = f'ALERTS{{alertname="{alert}", alertstate="firing"}}'
    assert watched.ask.over(expr, watched.calm + 1, watched.ended, 1), f"{alert} has not fired"


@pytest.mark.parametrize("rule", alerts())
def test_an_alert_is_explained(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["action"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (monitoring.ROOT / page).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]


def test_promtool_is_content() -> None:
    """Configuration, rules, and the unit tests of all alerts."""
    promtool = str(monitoring.find("promtool"))
    tests = monitoring.CONFIG / "tests" / "alerts.yml"
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", str(tests)]):
        done = subprocess.run(
            [promtool, *arguments], cwd=monitoring.CONFIG, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    tested = set(re.findall(r"alertname: (\w+)\n", tests.read_text()))
    assert tested == {param.values[0]["alert"] for param in alerts()}, "each fires in a test"


# ------------------------------------------------------------------------------------ vLLM's queries


@pytest.mark.parametrize("expr", VLLM)
def test_a_query_for_vllm_has_an_answer(watched: Watched, expr: str) -> None:
    """As dashboards made for vLLM ask: with the engine that one of its gauges names."""
    (engine,) = watched.ask.choices("label_values(vllm:kv_cache_usage_perc, engine)")
    values = {"model_name": EMBEDDED_MODEL, "engine": engine}
    assert_answered(watched.ask.at(ask.fill(expr, values, WINDOW), watched.calm), expr)
    check_names(watched, expr)


# -------------------------------------------------------------------------------------------- names

SELECTOR = re.compile(r"([a-zA-Z_][\w:]*)\s*\{([^}]*)\}")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
CALL = re.compile(r"\b[a-z_]+\s*\(")
NAME = re.compile(r"[a-zA-Z_][\w:]*")
OPERATORS = {
    "and",
    "or",
    "unless",
    "bool",
    "by",
    "without",
    "inf",
    "on",
    "ignoring",
    "sum",
    "max",
    "min",
    "avg",
}


def check_names(watched: Watched, expr: str) -> None:
    """Every metric and label of `expr` is one that services export or rules record, or Prometheus's own."""
    recorded = {p.values[0]["record"]: {"model_name", "engine"} for p in rules() if "record" in p.values[0]}
    own: dict[str, set[str]] = {"up": set(), "ALERTS": {"alertname", "alertstate"}}
    known = {**watched.exposed, **recorded, **own}
    text = re.sub(r'"[^"]*"', '""', re.sub(r"\[[^]]*\]", "", expr))
    used: set[str] = set()
    for name, matchers in SELECTOR.findall(text):
        assert name in known, f"nothing exports {name}"
        wrong = {*NAME.findall(matchers)} - known[name] - LABELS_OF_SCRAPES
        assert not wrong, f"{name} has no label {wrong}"
        used.add(name)
    rest = SELECTOR.sub(lambda match: match[1], text)
    grouped = {label for labels in GROUPING.findall(rest) for label in NAME.findall(labels)}
    names = {*NAME.findall(CALL.sub("(", GROUPING.sub("", rest)))} - OPERATORS
    assert names <= set(known), f"nothing exports {names - set(known)}"
    used |= names
    assert used, f"{expr} asks for no metric"
    wrong = grouped - LABELS_OF_SCRAPES - {label for name in used for label in known[name]}
    assert not wrong, f"{expr}: no metric in it has a label {wrong}"
