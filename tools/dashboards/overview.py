"""All functions and GPUs at a glance."""

from __future__ import annotations

from hasgpu_runtime import metric_catalogue as m

from tools.dashboards.model import RATE, RATIO, Dashboard, Panel, Query, in_time, name, quantile, rate, share, total

SLO_STEPS = {
    "thresholds": {
        "mode": "absolute",
        "steps": [
            {"color": "red", "value": None},
            {"color": "orange", "value": 0.9},
            {"color": "green", "value": 0.95},
        ],
    }
}
UP_STEPS = {
    "thresholds": {"mode": "absolute", "steps": [{"color": "red", "value": None}, {"color": "green", "value": 1}]},
    "mappings": [
        {"type": "value", "options": {"0": {"text": "down", "color": "red"}, "1": {"text": "up", "color": "green"}}}
    ],
}

OVERVIEW = Dashboard(
    "hasgpu-overview",
    "hasgpu: overview",
    "All functions and GPUs at a glance.",
    {
        "Now": (
            Panel(
                "Answered in time",
                (Query(in_time("", "job"), "in time"),),
                "Share of all requests that were answered inside their objectives.",
                "percentunit",
                "stat",
                4,
                5,
                defaults={**RATIO, **SLO_STEPS},
            ),
            Panel(
                "Requests",
                (Query(rate(m.REQUESTS, by="job"), "requests"),),
                "Requests that ended, a second.",
                "reqps",
                "stat",
                4,
                5,
            ),
            Panel(
                "GPUs reserved",
                (Query(f"sum by (job) ({name(m.GPU_ASKED)})", "GPUs"),),
                "The sum of all shares: so many whole GPUs are reserved.",
                "none",
                "stat",
                4,
                5,
                defaults={"decimals": 2},
            ),
            Panel(
                "Cost of an hour",
                (Query(f"sum by (job) (rate({name(m.FUNCTION_COST)}[{RATE}])) * 3600", "an hour"),),
                "At the present shares; empty without HASGPU_GPU_PRICE_PER_HOUR.",
                "none",
                "stat",
                4,
                5,
                defaults={"decimals": 2},
            ),
            Panel(
                "Instances",
                (Query(total(m.INSTANCES, by="state"), "{{state}}"),),
                "By state.",
                "none",
                "stat",
                4,
                5,
            ),
            Panel(
                "Services",
                (Query('min by (job) (up{job=~"hasgpu-.*"})', "{{job}}"),),
                "Whether their metrics can be read.",
                "none",
                "stat",
                4,
                5,
                defaults=UP_STEPS,
                options={"colorMode": "background", "textMode": "name"},
            ),
        ),
        "Functions": (
            Panel("Requests", (Query(rate(m.REQUESTS), "{{function}}"),), "That ended, a second.", "reqps"),
            Panel(
                "Latency over objective, 95th percentile",
                (Query(quantile(0.95, m.REQUEST_SLO_RATIO), "{{function}}"),),
                "Above 1 more than 5 % are late.",
                "none",
            ),
            Panel(
                "Answered in time",
                (Query(in_time(""), "{{function}}"),),
                "Refused and failed requests count as not in time.",
                "percentunit",
                defaults=RATIO,
            ),
            Panel("In line", (Query(total(m.QUEUE_LENGTH), "{{function}}"),), "Requests waiting.", "none"),
            Panel(
                "GPUs reserved",
                (Query(share("", "function"), "{{function}}"),),
                "SM share times request, of all instances.",
                "none",
                stacked=True,
            ),
            Panel(
                "Not in time, by why",
                (Query(rate(m.REQUESTS, 'outcome!="in_time"', "outcome"), "{{outcome}}"),),
                "Late, expired, failed or refused, a second.",
                "reqps",
                stacked=True,
            ),
        ),
        "Devices": (
            Panel(
                "Reserved",
                (Query(total(m.GPU_ASKED, by="node, gpu"), "{{node}} {{gpu}}"),),
                "Part of each GPU.",
                "percentunit",
                defaults=RATIO,
            ),
            Panel(
                "Delivered",
                (Query(total(m.GPU_DELIVERED, by="node, gpu"), "{{node}} {{gpu}}"),),
                "Part of each GPU that was really held; lent idle time too.",
                "percentunit",
                defaults=RATIO,
            ),
            Panel(
                "Health",
                (Query(f"max by (node, gpu, health) ({name(m.GPU_HEALTH)})", instant=True),),
                "Of each device, now.",
                "none",
                "table",
            ),
        ),
    },
)
