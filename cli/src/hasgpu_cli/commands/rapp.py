"""`hasgpu rapp`: the latency predictor's tools."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from hasgpu_cli.commands.rapp_service import COMMANDS

PROBE_ROWS = "batch=4,sm_pct=100,quota_pct=20/40/60/80/100"
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group("rapp")
def rapp_command() -> None:
    """The latency predictor: how right it is."""


@rapp_command.command("evaluate")
@click.option("--train-latency", required=True, type=_FILE, help="model, batch, sm_pct, quota_pct, latency_ms.")
@click.option("--train-ops", required=True, type=_FILE, help="One row an operator.")
@click.option("--train-probes", required=True, type=_FILE, help="model, batch, sm_pct, graph_latency_ms.")
@click.option("--test-latency", required=True, type=_FILE)
@click.option("--test-ops", required=True, type=_FILE)
@click.option("--test-probes", required=True, type=_FILE)
@click.option("--probe-rows", default=PROBE_ROWS, show_default=True, help="Rows of an unseen model that it may see.")
@click.option("--json", "json_path", type=_FILE, help="Write the figures here.")
@click.option("--page", "page_path", type=_FILE, help="Write a page with plots here (HTML).")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1, 256))
def evaluate_command(
    train_latency: Path,
    train_ops: Path,
    train_probes: Path,
    test_latency: Path,
    test_ops: Path,
    test_probes: Path,
    probe_rows: str,
    json_path: Path | None,
    page_path: Path | None,
    seed: int,
    threads: int,
) -> None:
    """Train on some files and tell the error on others.

    Test models that are not in the training files are predicted from their operators, the probe rows and the graph
    probes; of others the configurations that the training files lack are predicted. Errors are in per cent.
    """
    from hasgpu_predictor.evaluation import Data, ProbeRows, evaluate, training_settings
    from hasgpu_predictor.page import page
    from hasgpu_predictor.transfer import TransferSettings

    rows = ProbeRows.parse(probe_rows)
    train = Data.read(train_latency, train_ops, train_probes)
    test = Data.read(test_latency, test_ops, test_probes)
    result = evaluate(
        train,
        test,
        rows,
        now_s=time.perf_counter,
        transfer=TransferSettings(
            seed=seed, threads_count=threads, probe_batch=float(rows.batch), probe_sm_pct=rows.sm_pct
        ),
        training=training_settings(seed=seed, threads_count=threads),
        progress=lambda text: click.echo(text, err=True),
    )
    figures = result.summary()
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(figures, indent=1) + "\n")
    if page_path is not None:
        page_path.parent.mkdir(parents=True, exist_ok=True)
        page_path.write_text(page(result))
    click.echo(
        f"MAPE {figures['mape']:.2f} %, median {figures['median_ape']:.2f} %, 95th percentile "
        f"{figures['p95_ape']:.2f} % of {figures['n']} rows; {figures['coverage_90']:.1f} % in the 90 % interval; "
        f"trained in {figures['train_s']:.1f} s, {figures['predict_us_per_config']:.1f} us a configuration"
    )


for _command in COMMANDS:
    rapp_command.add_command(_command)
