# SPDX-License-Identifier: GPL-2.0-or-later
"""The dashboard, the alerts and the documentation of the metrics, held against the metrics that there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qrapd import metrics
from test_metrics import make_host, make_vm

PROJECT = Path(__file__).resolve().parent.parent
ALERTS = PROJECT / "config/prometheus-alerts.yml"
DASHBOARD = PROJECT / "config/grafana-dashboard.json"
DOCUMENT = PROJECT / "docs/metrics.md"

TEXT = metrics.render(make_host(make_vm("web", (5.0,))))[0]
FAMILIES = list(text_string_to_metric_families(TEXT.decode()))
LABELS = {
    sample.name: {"instance", "job", *sample.labels} for family in FAMILIES for sample in family.samples
}
"""By metric; Prometheus itself adds the host's."""
VALUES = {
    (sample.name, *item) for family in FAMILIES for sample in family.samples for item in sample.labels.items()
}

dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())


def panel_expressions() -> list[str]:
    """What the panels ask for, with Grafana's variables filled in."""
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    filled = {"$instance": ".*", "$vm": ".*", "$__range": "6h", "$__rate_interval": "5m"}
    for name, text in filled.items():
        found = [each.replace(name, text) for each in found]
    return found


def alert_expressions() -> list[str]:
    """What the alerts ask for: each on a line of its own."""
    return re.findall(r"^ +expr: (.+)$", ALERTS.read_text(), re.MULTILINE)


EXPRESSIONS = [*panel_expressions(), *alert_expressions()]


def selectors(text: str) -> Iterator[tuple[str, str]]:
    """Metrics, and the labels that they are selected by: ``name`` and what is between the braces."""
    yield from re.findall(r"\b((?:qrapd|process)_[a-z_]+)(?:\{([^}]*)\})?", text)


def test_the_search_finds_expressions() -> None:
    """The tests below would pass with none."""
    assert 8 <= len(alert_expressions()) == ALERTS.read_text().count("- alert:")
    assert 15 <= len(panel_expressions())
    assert [] == [each for each in EXPRESSIONS if not list(selectors(each))]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_asked_for_is_there(expression: str) -> None:
    """Every metric, every label of it, and every state and reason that is compared with."""
    assert "$" not in expression
    for name, labels in selectors(expression):
        assert name in LABELS
        for label, words in re.findall(r'(\w+) *(?:=~|!~|!=|=) *"([^"]*)"', labels):
            assert label in LABELS[name]
            if words != ".*":
                for word in words.split("|"):
                    assert (name, label, word) in VALUES
    for labels in re.findall(r"\b(?:by|without|on) \(([^)]*)\)", expression):
        assert {each.strip() for each in labels.split(",")} <= set().union(
            *(LABELS[name] for name, _ in selectors(expression))
        )


def test_variables_of_the_dashboard() -> None:
    """Each is defined by a metric that there is, and no other is used."""
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert {"datasource", "instance", "vm"} == set(variables)
    for name in ("instance", "vm"):
        asked = variables[name]["definition"]
        assert name in LABELS[next(selectors(asked))[0]]
        assert asked == variables[name]["query"]["query"]
    text = DASHBOARD.read_text()
    assert {"datasource", "instance", "vm", "__range", "__rate_interval", "__all"} == set(
        re.findall(r"\$\{?(\w+)\}?", text)
    )


def test_the_dashboard_can_be_imported() -> None:
    """What Grafana wants of one: an id by which it is replaced, a version of the form, panels that do not overlap."""
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= set(dashboard)
    assert re.fullmatch(r"[a-z0-9-]{1,40}", dashboard["uid"])
    assert "id" not in dashboard  # of another Grafana's database
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["title"]
        place = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert taken.isdisjoint(cells), panel["title"]
        assert all(x < 24 for x, _ in taken)
        cells |= taken
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"]


def test_every_metric_is_used() -> None:
    """By an alert or a panel, or it is for people who ask for it by name: then it stands here."""
    for_people = {"qrapd_link_info", "qrapd_link_generation", "qrapd_vm_state_since_timestamp_seconds"}
    used = {name for each in EXPRESSIONS for name, _ in selectors(each)}
    used |= {name for each in dashboard["templating"]["list"] for name, _ in selectors(str(each["query"]))}
    names = {family.name for family in FAMILIES if family.name.startswith("qrapd_")}
    unused = {name for name in names if not any(each.startswith(name) for each in used)}
    assert for_people == unused


def test_the_documentation_has_every_metric() -> None:
    """With its labels, and none that there is not."""
    rows = re.findall(
        r"^\| `((?:qrapd|process)_\w+)(?:\{([\w, ]+)\})?` \| (\w+)", DOCUMENT.read_text(), re.MULTILINE
    )
    kinds = re.findall(r"^# TYPE (\S+) (\w+)$", TEXT.decode(), re.MULTILINE)
    assert dict(kinds) == {name: kind for name, _, kind in rows}
    for name, labels, kind in rows:
        sample = f"{name}_sum" if kind == "histogram" else name
        documented = {each.strip() for each in labels.split(",") if each}
        assert LABELS[sample] - {"instance", "job"} == documented


def test_the_documentation_has_every_alert() -> None:
    """And none that there is not."""
    alerts = re.findall(r"^ +- alert: (\w+)$", ALERTS.read_text(), re.MULTILINE)
    assert alerts == re.findall(r"^\| `(Qrapd\w+)` \|", DOCUMENT.read_text(), re.MULTILINE)


# ---- by Prometheus' own tool


def promtool(*arguments: str, text: bytes = b"") -> str:
    """Run it; what it says is the failure's message. scripts/setup puts it into .cache/bin, as no daemon is wanted."""
    places = f"{PROJECT / '.cache/bin'}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("promtool", path=places)
    if program is None:
        pytest.skip("promtool is not installed (in Debian: prometheus)")
    done = subprocess.run(
        [program, *arguments], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
    )
    said = done.stdout.decode(errors="replace")
    if done.returncode:
        pytest.fail(f"promtool {' '.join(arguments)} ended with {done.returncode}:\n{said}", pytrace=False)
    return said


needs_promtool = pytest.mark.may_skip("promtool comes with a daemon, and not everybody wants that")


@needs_promtool
def test_promtool_takes_the_alerts() -> None:
    """They are valid."""
    assert "8 rules found" in promtool("check", "rules", str(ALERTS))


@needs_promtool
def test_promtool_takes_the_panels(tmp_path: Path) -> None:
    """Their expressions are, too: as rules, which it can check."""
    rules = [{"record": f"panel:{n}", "expr": each} for n, each in enumerate(panel_expressions())]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(tmp_path / "rules.yml"))


@needs_promtool
def test_promtool_likes_the_metrics() -> None:
    """Names, units and help are by the conventions; it says nothing."""
    assert "" == promtool("check", "metrics", text=TEXT)


LINK = 'vm="web", link="0", instance="h", job="qrapd"'
VM = 'vm="web", instance="h", job="qrapd"'

# By alert: series a minute apart in which it comes, and such in which it must not. `1x9` is 1 ten times.
SERIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "QrapdVmFailed": (
        {f'qrapd_vm_state{{state="failed", {VM}}}': "1x30"},
        {f'qrapd_vm_state{{state="failed", {VM}}}': "0x30", f'qrapd_vm_state{{state="ready", {VM}}}': "1x30"},
    ),
    "QrapdVmRestarting": (
        {f"qrapd_vm_restarts_total{{{VM}}}": "0+1x30"},
        {f"qrapd_vm_restarts_total{{{VM}}}": "0x15 1x14"},
    ),
    "QrapdLinkDown": (
        {f'qrapd_link_state{{state="down", {LINK}}}': "0x10 1x1 0x1 1x15"},
        {f'qrapd_link_state{{state="down", {LINK}}}': "0x29 1x0"},
    ),
    "QrapdLinkGivenUp": (
        {f'qrapd_link_state{{state="failed", {LINK}}}': "0x29 1x0"},
        {f'qrapd_link_state{{state="down", {LINK}}}': "1x30"},
    ),
    "QrapdLinkFlapping": (
        {
            f'qrapd_link_outages_total{{reason="exited", {LINK}}}': "0+0.2x30",
            f'qrapd_link_outages_total{{reason="stalled", {LINK}}}': "0+0.2x30",
        },
        {f'qrapd_link_outages_total{{reason="requested", {LINK}}}': "0+5x30"},
    ),
    "QrapdEventLoopLag": (
        {'qrapd_event_loop_lag_seconds{instance="h", job="qrapd"}': "0.7x30"},
        {'qrapd_event_loop_lag_seconds{instance="h", job="qrapd"}': "9x27 0.001x0 9x1"},
    ),
    "QrapdOpenFds": (
        {
            'process_open_fds{instance="h", job="qrapd"}': "900x30",
            'process_max_fds{instance="h", job="qrapd"}': "1024x30",
            'qrapd_build_info{instance="h", job="qrapd", version="1"}': "1x30",
        },
        {  # another program on the same host
            'process_open_fds{instance="h", job="node"}': "900x30",
            'process_max_fds{instance="h", job="node"}': "1024x30",
            'qrapd_build_info{instance="h", job="qrapd", version="1"}': "1x30",
        },
    ),
    "QrapdDown": (
        {'qrapd_build_info{instance="h", job="qrapd", version="1"}': "1x20 stale"},
        {  # an upgrade
            'qrapd_build_info{instance="h", job="qrapd", version="1"}': "1x20 stale",
            'qrapd_build_info{instance="h", job="qrapd", version="2"}': "_x20 1x10",
        },
    ),
}


@needs_promtool
@pytest.mark.parametrize("alert", SERIES)
def test_alerts_come_when_they_should(alert: str, tmp_path: Path) -> None:
    """By series that are made up: each comes for what it is for, and not for what is like it."""
    for comes, series in zip((True, False), SERIES[alert], strict=True):
        test = {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            # By count: the labels of what comes are not what is at stake.
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)',
                    "eval_time": "30m",
                    "exp_samples": [{"labels": "{}", "value": int(comes)}],
                }
            ],
        }
        file = tmp_path / f"{comes}.yml"
        file.write_text(
            json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]})
        )
        promtool("test", "rules", str(file))


def test_every_alert_is_tried() -> None:
    """None without series in which it comes."""
    assert list(SERIES) == re.findall(r"^ +- alert: (\w+)$", ALERTS.read_text(), re.MULTILINE)
