"""A GPU as a mosaic of shares."""

from __future__ import annotations

from hasgpu_runtime import metric_catalogue as m

from tools.dashboards.model import RATIO, Dashboard, Panel, Query, name, rate, share, total, variable

GPU = 'node="$node",gpu="$gpu"'
NODES = variable("node", f"label_values({name(m.GPU_INFO)}, node)")
GPUS = variable("gpu", f'label_values({name(m.GPU_INFO)}{{node="$node"}}, gpu)')

MOSAIC = (
    {
        "id": "groupingToMatrix",
        "options": {"columnField": "instance_id", "rowField": "row", "valueField": "Value", "emptyValue": "zero"},
    },
)

ONE_GPU = Dashboard(
    "hasgpu-gpu",
    "hasgpu: one GPU",
    "A GPU as a mosaic of shares: its rows beside each other, the instances of a row above each other.",
    {
        "Now": (
            Panel(
                "Mosaic: who has which part of each row's time",
                (
                    Query(
                        f"sum by (row, instance_id) ({name(m.ALLOCATION_REQUEST)}{{{GPU}}})",
                        instant=True,
                    ),
                ),
                "One column a row; the height of a piece is an instance's guaranteed share of time, what is empty up "
                "to 100 % is free. How wide a row is, is beside it.",
                "percentunit",
                "barchart",
                10,
                10,
                maximum=1,
                defaults={"min": 0, "custom": {"fillOpacity": 80, "lineWidth": 1}},
                options={"stacking": "normal", "xField": "row\\instance_id", "showValue": "auto", "groupWidth": 0.95},
                transformations=MOSAIC,
            ),
            Panel(
                "Width of the rows",
                (Query(total(m.ROW_SM, GPU, "row", "max"), "row {{row}}"),),
                "Share of the SMs.",
                "percentunit",
                "bargauge",
                4,
                10,
                defaults=RATIO,
                options={"orientation": "horizontal", "displayMode": "gradient"},
            ),
            Panel(
                "Parts of the GPU",
                (
                    Query(share(GPU, "instance_id"), "{{instance_id}}"),
                    Query(f"1 - sum by (node) ({name(m.GPU_ASKED)}{{{GPU}}})", "free"),
                ),
                "SM share times request.",
                "percentunit",
                "piechart",
                6,
                10,
                options={
                    "pieType": "pie",
                    "legend": {"displayMode": "table", "placement": "bottom", "values": ["value"]},
                },
            ),
            Panel(
                "What it is",
                (
                    Query(
                        f"max by (model, backend, mode) ({name(m.GPU_INFO)}{{{GPU}}})", "{{model}} {{backend}} {{mode}}"
                    ),
                    Query(f"max by (health) ({name(m.GPU_HEALTH)}{{{GPU}}})", "health: {{health}}"),
                ),
                "Model, backend, way of sharing; health.",
                "none",
                "stat",
                4,
                10,
                options={"textMode": "name", "orientation": "horizontal"},
            ),
        ),
        "Over time": (
            Panel(
                "Mosaic over time",
                (Query(share(GPU, "instance_id"), "{{instance_id}}"),),
                "The part of the GPU that each instance has; 100 % is the whole GPU.",
                "percentunit",
                width=12,
                stacked=True,
                maximum=1,
            ),
            Panel(
                "Asked and delivered",
                (
                    Query(total(m.GPU_ASKED, GPU, "gpu"), "asked"),
                    Query(total(m.GPU_DELIVERED, GPU, "gpu"), "delivered"),
                    Query(total(m.GPU_UTILISATION, GPU, "gpu"), "any kernel ran"),
                ),
                "Parts of the GPU.",
                "percentunit",
                width=12,
                defaults=RATIO,
            ),
            Panel(
                "Time guaranteed and delivered, by instance",
                (
                    Query(total(m.ALLOCATION_REQUEST, GPU, "instance_id"), "{{instance_id}} guaranteed"),
                    Query(rate(m.INSTANCE_DEVICE_TIME, GPU, "instance_id"), "{{instance_id}} delivered"),
                ),
                "Share of the device's time.",
                "percentunit",
                width=12,
                defaults={"min": 0},
            ),
            Panel(
                "Debt",
                (Query(total(m.INSTANCE_DEBT, GPU, "instance_id"), "{{instance_id}}"),),
                "Device time used beyond the quota and not yet made up for.",
                "s",
                width=12,
            ),
        ),
        "Device": (
            Panel(
                "Memory",
                (
                    Query(total(m.GPU_MEMORY_TOTAL, GPU, "gpu"), "has"),
                    Query(total(m.GPU_MEMORY_PROMISED, GPU, "gpu"), "promised"),
                    Query(total(m.GPU_MEMORY_USED, GPU, "gpu"), "in use"),
                ),
                "Promised to instances, and in use where the driver tells.",
                "bytes",
            ),
            Panel("Power", (Query(total(m.GPU_POWER, GPU, "gpu"), "power"),), "Where the driver tells.", "watt"),
            Panel(
                "Temperature and clock",
                (
                    Query(total(m.GPU_TEMPERATURE, GPU, "gpu"), "temperature, °C"),
                    Query(f"{total(m.GPU_SM_CLOCK, GPU, 'gpu')} / 1e6", "SM clock, MHz"),
                ),
                "Where the driver tells.",
                "none",
            ),
        ),
    },
    (NODES, GPUS),
)
