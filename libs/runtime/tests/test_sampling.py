from __future__ import annotations

import logging

import pytest
from hasgpu_runtime.sampling import Sampler, parse_traceparent, sampler_of


@pytest.mark.parametrize(
    ("sampler", "argument", "expected"),
    [
        ("", "", (1.0, True, True)),
        ("always_on", "", (1.0, False, True)),
        ("always_off", "", (0.0, False, False)),
        ("traceidratio", "0.25", (0.25, False, True)),
        ("parentbased_always_on", "0.1", (1.0, True, True)),
        ("parentbased_always_off", "", (0.0, True, True)),
        ("parentbased_traceidratio", "0.01", (0.01, True, True)),
        ("parentbased_traceidratio", "", (1.0, True, True)),
    ],
)
def test_the_standard_variables_are_read(sampler, argument, expected, caplog):
    found = sampler_of({"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument})
    assert (found.ratio, found.parent_based, found.decisions) == expected
    assert caplog.records == []


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"OTEL_TRACES_SAMPLER": "some"}, "OTEL_TRACES_SAMPLER: expected one of always_on"),
        (
            {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "1 %"},
            "OTEL_TRACES_SAMPLER_ARG: expected a ratio 0..1, got '1 %'",
        ),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}, "got '2'"),
    ],
)
def test_a_wrong_value_is_named_and_the_default_taken(environ, said, caplog):
    with caplog.at_level(logging.WARNING):
        assert sampler_of(environ).ratio == 1.0
    assert said in caplog.text


def test_about_the_ratio_is_kept_and_an_id_is_always_decided_alike():
    sampler = Sampler(ratio=0.1)
    ids = [sampler.new_trace_id() for _ in range(20_000)]
    kept = [trace_id for trace_id in ids if sampler.keeps(trace_id)]
    assert 0.08 < len(kept) / len(ids) < 0.12
    assert all(Sampler(ratio=0.2).keeps(trace_id) for trace_id in kept)
    assert not any(Sampler(ratio=0.0).keeps(trace_id) for trace_id in ids)
    assert all(Sampler(ratio=1.0).keeps(trace_id) for trace_id in ids)


def test_the_ratio_is_taken_as_the_sdk_takes_it():
    from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

    ours, theirs = Sampler(ratio=0.3), TraceIdRatioBased(0.3)
    for trace_id in (ours.new_trace_id() for _ in range(500)):
        decision = theirs.should_sample(None, trace_id, "x").decision
        assert ours.keeps(trace_id) == (decision is Decision.RECORD_AND_SAMPLE)


def test_a_later_version_of_the_header_may_say_more():
    ids = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"
    context = parse_traceparent(f"01-{ids}-01-more")
    assert context is not None
    assert context.sampled
    assert parse_traceparent(f"00-{ids}-01-more") is None
    assert parse_traceparent(f"ff-{ids}-01") is None
