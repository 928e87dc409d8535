"""Whether the loops run, on what data, and what they do."""

from __future__ import annotations

from hasgpu_runtime import metric_catalogue as m

from tools.dashboards.model import RATE, Dashboard, Panel, Query, name, quantile, rate, total

LOOPS = Dashboard(
    "hasgpu-loops",
    "hasgpu: control loops",
    "Whether the loops run, on what data, and what they do.",
    {
        "Loops": (
            Panel(
                "Duration of a pass, 95th percentile",
                (Query(quantile(0.95, m.LOOP_DURATION, by="loop"), "{{loop}}"),),
                "Of all passes.",
                "s",
            ),
            Panel(
                "Passes",
                (Query(rate(m.LOOP_DURATION, by="loop, outcome", part="count"), "{{loop}} {{outcome}}"),),
                "A second, by outcome.",
                "ops",
            ),
            Panel(
                "Since the last pass that did not fail",
                (Query(f"max by (job, instance, loop) ({name(m.LOOP_DONE_AGE)})", "{{loop}} {{instance}}"),),
                "Of each process.",
                "s",
            ),
            Panel(
                "Age of the data used",
                (Query(f"max by (loop, source) ({name(m.LOOP_DATA_AGE)})", "{{loop}}: {{source}}"),),
                "The oldest input of the last pass. A table is computed anew only when something has changed.",
                "s",
            ),
            Panel(
                "Leading",
                (Query(f"max by (loop, instance) ({name(m.LOOP_LEADING)})", "{{loop}} {{instance}}"),),
                "1 in the replica that decides.",
                "none",
                defaults={"custom": {"lineInterpolation": "stepAfter"}},
            ),
            Panel(
                "Waiting, paused",
                (
                    Query(f"max by (loop) ({name(m.LOOP_WAITING)})", "{{loop}} waits"),
                    Query(f"max by (job) ({name(m.SCALING_PAUSED)})", "scaling is paused"),
                ),
                "For the bus or the store; by hand.",
                "none",
                defaults={"custom": {"lineInterpolation": "stepAfter"}},
            ),
        ),
        "What they do": (
            Panel(
                "Changes decided",
                (Query(f"sum by (kind) (increase({name(m.SCALE_ACTIONS)}[{RATE}]))", "{{kind}}"),),
                "Of all functions.",
                "none",
                stacked=True,
            ),
            Panel(
                "Share changes: until in force, 95th percentile",
                (Query(quantile(0.95, m.SHARE_APPLY_DURATION, by="node, outcome"), "{{node}} {{outcome}}"),),
                "From writing a share to the worker's confirmation.",
                "s",
            ),
            Panel(
                "Plans written",
                (Query(f"sum by (node) (increase({name(m.PLANS_WRITTEN)}[{RATE}]))", "{{node}}"),),
                "By node.",
                "none",
            ),
            Panel(
                "Nodes",
                (Query(f"max by (node) ({name(m.NODE_HEARTBEAT_AGE)})", "{{node}}"),),
                "Since the last heartbeat.",
                "s",
            ),
            Panel(
                "Without a place",
                (Query(total(m.INSTANCES_UNPLACED), "{{function}}"),),
                "Instances wanted for which no GPU has room; no line: none.",
                "none",
            ),
            Panel(
                "Profile runs",
                (Query(f"max by (job) ({name(m.PROFILES_RUNNING)})", "running"),),
                "Under way or waiting for a device.",
                "none",
            ),
        ),
        "Processes": (
            Panel(
                "CPU",
                (
                    Query(
                        f'sum by (job, instance) (rate(process_cpu_seconds_total{{job=~"hasgpu-.*"}}[{RATE}]))',
                        "{{job}} {{instance}}",
                    ),
                ),
                "Cores.",
                "none",
            ),
            Panel(
                "Memory",
                (
                    Query(
                        'sum by (job, instance) (process_resident_memory_bytes{job=~"hasgpu-.*"})',
                        "{{job}} {{instance}}",
                    ),
                ),
                "Resident.",
                "bytes",
            ),
            Panel(
                "Warnings and errors in the logs",
                (Query(f"sum by (job, level) (increase({name(m.LOG_RECORDS)}[{RATE}]))", "{{job}} {{level}}"),),
                "Records.",
                "none",
                stacked=True,
            ),
        ),
    },
)
