"""What a function's callers see, what it was given, and what that costs."""

from __future__ import annotations

from hasgpu_runtime import metric_catalogue as m

from tools.dashboards.model import (
    RATE,
    RATIO,
    Dashboard,
    Panel,
    Query,
    in_time,
    name,
    quantile,
    rate,
    total,
    variable,
)

FN = 'function=~"$function"'
FUNCTIONS = variable("function", f"label_values({name(m.FUNCTION_SLO)}, function)")

FUNCTION = Dashboard(
    "hasgpu-function",
    "hasgpu: one function",
    "What a function's callers see, what it was given, and what that costs.",
    {
        "What callers see": (
            Panel(
                "Answered in time",
                (Query(in_time(FN), "in time"), Query(total(m.FUNCTION_SLO_TARGET, FN, how="max"), "asked")),
                "Against the share asked for.",
                "percentunit",
                defaults=RATIO,
            ),
            Panel(
                "Latency",
                (
                    Query(quantile(0.5, m.REQUEST_DURATION, FN), "median"),
                    Query(quantile(0.95, m.REQUEST_DURATION, FN), "95 %"),
                    Query(quantile(0.99, m.REQUEST_DURATION, FN), "99 %"),
                    Query(total(m.FUNCTION_SLO, FN, how="max"), "objective"),
                ),
                "From arrival to answer.",
                "s",
            ),
            Panel(
                "Latency over objective",
                (Query(f"sum by (le) (increase({name(m.REQUEST_SLO_RATIO, 'bucket')}{{{FN}}}[{RATE}]))", "{{le}}"),),
                "How many requests took how much of their objective; above 1 they are late.",
                "none",
                "heatmap",
                options={"calculate": False, "yAxis": {"unit": "none"}, "color": {"scheme": "Spectral"}},
            ),
            Panel(
                "Requests by outcome",
                (Query(rate(m.REQUESTS, FN, "outcome"), "{{outcome}}"),),
                "In time, late, expired, failed, refused.",
                "reqps",
                stacked=True,
            ),
            Panel(
                "In line and at workers",
                (
                    Query(total(m.QUEUE_LENGTH, FN), "in line"),
                    Query(total(m.IN_FLIGHT, FN), "at workers"),
                ),
                "Requests.",
                "none",
            ),
            Panel(
                "Oldest wait",
                (
                    Query(total(m.QUEUE_OLDEST_WAIT, FN, how="max"), "oldest"),
                    Query(total(m.FUNCTION_SLO, FN, how="max"), "objective"),
                ),
                "Of the requests in line.",
                "s",
            ),
        ),
        "Demand and capacity": (
            Panel(
                "Demand and capacity",
                (
                    Query(total(m.DEMAND_RATE, FN, how="max"), "arrives"),
                    Query(total(m.DEMAND_PREDICTED, FN, how="max"), "expected"),
                    Query(total(m.DEMAND_NEEDED, FN, how="max"), "asked for"),
                    Query(total(m.CAPACITY, FN, how="max"), "capacity"),
                ),
                "Items a second, as the last decision saw them.",
                "none",
            ),
            Panel(
                "Decisions",
                (
                    Query(
                        f"sum by (kind, origin) (increase({name(m.SCALE_ACTIONS)}{{{FN}}}[{RATE}]))",
                        "{{kind}} ({{origin}})",
                    ),
                ),
                "Changes of instances; `hasgpu explain` tells why.",
                "none",
                stacked=True,
            ),
            Panel(
                "Instances",
                (
                    Query(total(m.INSTANCES, FN, "state"), "{{state}}"),
                    Query(total(m.INSTANCES_DESIRED, FN, "role", "max"), "wanted {{role}}"),
                ),
                "By state, and what the scaler wants.",
                "none",
            ),
        ),
        "Shares and cost": (
            Panel(
                "Quota of each instance",
                (Query(total(m.ALLOCATION_REQUEST, FN, "instance_id", "max"), "{{instance_id}}"),),
                "Share of the device's time that is guaranteed.",
                "percentunit",
                defaults={"min": 0},
            ),
            Panel(
                "SMs of each instance",
                (Query(total(m.ALLOCATION_SM, FN, "instance_id", "max"), "{{instance_id}}"),),
                "Share of the GPU's multiprocessors.",
                "percentunit",
                defaults=RATIO,
            ),
            Panel(
                "Time delivered to each instance",
                (Query(rate(m.INSTANCE_DEVICE_TIME, FN, "instance_id"), "{{instance_id}}"),),
                "Seconds of device held, a second; above the quota it has borrowed idle time.",
                "percentunit",
                defaults={"min": 0},
            ),
            Panel(
                "GPUs reserved and used",
                (
                    Query(rate(m.FUNCTION_GPU_TIME, FN), "reserved"),
                    Query(rate(m.FUNCTION_GPU_USED, FN), "used"),
                ),
                "GPU-seconds a second.",
                "none",
            ),
            Panel(
                "GPU-seconds, in the time shown",
                (Query(f"sum by (function) (increase({name(m.FUNCTION_GPU_TIME)}{{{FN}}}[$__range]))", "reserved"),),
                "The integral of SM share times request.",
                "s",
                "stat",
                4,
            ),
            Panel(
                "Cost, in the time shown",
                (Query(f"sum by (function) (increase({name(m.FUNCTION_COST)}{{{FN}}}[$__range]))", "cost"),),
                "Empty without HASGPU_GPU_PRICE_PER_HOUR.",
                "none",
                "stat",
                4,
                defaults={"decimals": 4},
            ),
            Panel(
                "Batch size",
                (
                    Query(
                        f"{rate(m.BATCH_ITEMS, FN, part='sum')} / ({rate(m.BATCH_ITEMS, FN, part='count')} > 0)", "mean"
                    ),
                    Query(quantile(0.95, m.BATCH_ITEMS, FN), "95 %"),
                ),
                "Items of a batch.",
                "none",
            ),
        ),
        "Prediction": (
            Panel(
                "Observed over predicted latency",
                (
                    Query(quantile(0.1, m.BATCH_PREDICTION, FN), "10 %"),
                    Query(quantile(0.5, m.BATCH_PREDICTION, FN), "median"),
                    Query(quantile(0.9, m.BATCH_PREDICTION, FN), "90 %"),
                ),
                "Of batches. A prediction is for the guaranteed share: where idle time is lent, less than 1 is usual.",
                "none",
            ),
            Panel(
                "Correction in force",
                (
                    Query(
                        f"max by (device_model, part) ({name(m.PREDICTION_CORRECTION)}{{{FN}}})",
                        "{{device_model}} {{part}}",
                    ),
                ),
                "What rapp multiplies its predictions by.",
                "none",
            ),
            Panel(
                "Age of the table",
                (
                    Query(
                        f"max by (device_model, basis) ({name(m.TABLE_AGE)}{{{FN}}})",
                        "{{device_model}}, {{basis}}",
                    ),
                ),
                "A table is computed anew only when something has changed.",
                "s",
            ),
        ),
    },
    (FUNCTIONS,),
)
