"""report.html: one self-contained page that a person reads to believe, or doubt, a compiled model."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from qcompile.reporting import plots
from qcompile.reporting.markup import (
    Raw,
    code,
    details,
    figure,
    marked,
    page,
    pairs,
    paragraph,
    section,
    table,
    text,
    tiles,
)

MOST_RANGES = 12
MOST_CURVES = 24
NO_PLOTS = "Plots are left out: matplotlib is not installed (pip install 'qcompile-nn[report]')."

Record = Mapping[str, Any]


def render(record: Record, entries: Sequence[Record]) -> str:
    """The page for a manifest ``record``; ``entries`` are the ledger's, with the facts that plots need."""
    from qcompile.manifest import plain

    record = plain(record)
    name = record["name"]
    return page(
        f"qcompile: {name}",
        Raw(f"<h1>{text(name)}</h1>\n"),
        _lead(record),
        _summary(record),
        *([] if plots.available() else [paragraph(NO_PLOTS)]),
        _passes(entries),
        _gate(record["gate"], entries),
        _layers(record["layers"]),
        _ranges(_gather(entries, "channel_ranges")),
        _searches(_gather(entries, "search")),
        _kernels(record["kernels"]),
        _device(record.get("device")),
        _skips(entries),
        _inputs(record),
    )


def megabytes(count: int) -> str:
    """Bytes as MB (10^6)."""
    return f"{count / 1e6:.2f} MB"


def size_words(before: int, after: int) -> tuple[str, str]:
    """How two sizes in bytes compare: ``("3.91x smaller", "90.00 MB -> 23.00 MB")``."""
    factor = before / max(after, 1)
    ratio = f"{factor:.2f}x smaller" if factor >= 1 else f"{1 / max(factor, 1e-9):.2f}x larger"
    return ratio, f"{megabytes(before)} -> {megabytes(after)}"


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def proof_words(proof: Record | None) -> str:
    """A proof, as the manifest holds it, in a few words."""
    if proof is None:
        return ""
    if proof["relative"] is None:
        return "not comparable (NaN)"
    if proof["relative"] == 0:
        return "identical"
    if proof["tolerance"] is not None:
        return f"equal to {proof['relative']:.1e} (allowed {proof['tolerance']:.0e})"
    return f"SQNR {decibels(proof['sqnr_db'])}, relative {proof['relative']:.2g}"


def random_words(record: Record) -> str:
    """What to add to a figure of the outputs where the samples were random; empty where they were not."""
    return ", on random data" if record["calibration"]["kind"] == "random" else ""


def kernel_counts(kernels: Sequence[Record]) -> dict[str, int]:
    """How many matmuls reached each kernel, the most frequent first."""
    counts = collections.Counter(k["kernel"] for k in kernels)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _lead(record: Record) -> Raw:
    steps = ", ".join(step["spec"] for step in record["pipeline"])
    recipe, target = record["recipe"]["name"], record["target"]["name"]
    return Raw(f'<p class="lead">recipe {code(recipe)} for {code(target)}<br>{code(steps)}</p>\n')


def _summary(record: Record) -> Raw:
    ratio, sizes = size_words(record["sizes"]["before"], record["sizes"]["after"])
    kernels = record["kernels"]
    low = sum(1 for k in kernels if k["low_bit"])
    facts: list[tuple[Any, str]] = [
        (ratio.split()[0], f"{ratio.split()[1]}: {sizes}"),
        (f"{low} of {len(kernels)}", "matmuls run on integers"),
        (decibels(record["end_to_end"]["sqnr_db"]), f"end-to-end SQNR against the float model{random_words(record)}"),
        (sum(len(p["skips"]) for p in record["passes"]), "places left alone, each with a reason"),
    ]
    if record["gate"] is not None:
        gate = record["gate"]
        held = gate["drop"] is not None and gate["drop"] <= gate["max_drop"]
        facts.append((marked(gate["drop"], held), f"drop of {gate['metric']}, allowed {gate['max_drop']:g}"))
    return tiles(facts)


def _passes(entries: Sequence[Record]) -> Raw:
    rows = [
        (i, code(e["spec"]), e["preserves"], e["rewrites"], proof_words(e["proof"]), len(e["skips"]))
        for i, e in enumerate(entries, 1)
    ]
    heads = ("#", "pass", "claims to keep", "rewrites", "measured", "left alone")
    return section(
        "What every pass did",
        paragraph(
            "Each pass is measured on samples when it runs: a fold must keep the function, "
            "a lossy pass has its error recorded."
        ),
        table(heads, rows),
        *[_sites(e) for e in entries if e["sites"] or e["notes"] or _small_facts(e)],
    )


def _sites(entry: Record) -> Raw:
    notes = [paragraph(note) for note in entry["notes"]]
    facts = [paragraph(f"{key}: {value}") for key, value in _small_facts(entry).items()]
    heads = site_columns(entry["sites"])
    rows = [[site.get(h) for h in heads] for site in entry["sites"]]
    inner = Raw("".join([*notes, *facts, table(heads, rows) if rows else ""]))
    count = f": {len(entry['sites'])} sites" if rows else ""
    return details(f"{entry['name']}{count}", inner)


def site_columns(sites: Sequence[Record]) -> list[str]:
    """The keys of ``sites`` whose values are single values: ``site``, then by name, before ahead of after."""
    keys = {k: None for s in sites for k, v in s.items() if not isinstance(v, list | dict)}
    return sorted(keys, key=lambda k: (k != "site", k.replace("_after", "_then")))


def _small_facts(entry: Record) -> dict[str, str]:
    """Facts that fit in a line: numbers, words and flat tables of them."""
    found = {}
    for key, value in entry["facts"].items():
        if isinstance(value, dict) and all(not isinstance(v, list | dict) for v in value.values()):
            found[key] = ", ".join(f"{k} {v}" for k, v in value.items())
        elif not isinstance(value, list | dict):
            found[key] = str(value)
    return found


def _gate(gate: Record | None, entries: Sequence[Record]) -> Raw:
    """What the gate kept in higher precision, and how much each activation would have cost."""
    if gate is None:
        return Raw("")
    linears = gate.get("linears") or {}
    kept = [(code(n), s, ", ".join(linears.get(n, []))) for n, s in (gate.get("exceptions") or {}).items()]
    ranked = [
        (code(x["activation"]), x["damage"], ", ".join(x["linears"]))
        for entry in entries
        for x in entry["facts"].get("sensitivity") or []
    ]
    inner = [
        paragraph(f"{gate['metric']} may drop by {gate['max_drop']:g}; it dropped by {text(gate['drop'])}."),
        table(("activation", "kept as", "read by"), kept) if kept else paragraph("Nothing had to be kept."),
    ]
    if ranked:
        inner.append(details("how much each one costs", table(("activation", "damage", "read by"), ranked)))
    return section("Kept in higher precision", *inner)


def _layers(layers: Sequence[Record]) -> Raw:
    if not layers:
        return Raw("")
    ranked = sorted(layers, key=lambda x: float("inf") if x["sqnr_db"] is None else x["sqnr_db"])
    rows = [(code(x["site"]), decibels(x["sqnr_db"])) for x in ranked]
    drawn = [figure(plots.layer_bars(layers), "SQNR of each linear's output")] if plots.available() else []
    return section(
        "Error per layer",
        paragraph(
            "The output of each linear in the quantised model against the float model, with all the "
            "error that arrives from earlier layers."
        ),
        *drawn,
        table(("worst layers", "SQNR"), rows[:8]),
        *([details(f"all {len(rows)} layers", table(("layer", "SQNR"), rows))] if len(rows) > 8 else []),
    )


def _gather(entries: Sequence[Record], key: str) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for entry in entries:
        for site, value in (entry["facts"].get(key) or {}).items():
            found[f"{entry['name']}: {site}" if site in found else site] = value
    return found


def _ranges(ranges: Mapping[str, Record]) -> Raw:
    if not ranges or not plots.available():
        return Raw("")
    chosen = sorted(ranges, key=lambda s: (-_reach(ranges[s]["before"]), s))[:MOST_RANGES]
    drawn = [figure(plots.channel_ranges(ranges[s]["before"], ranges[s].get("after")), s) for s in chosen]
    words = f"The {len(chosen)} widest of {len(ranges)} sites." if len(chosen) < len(ranges) else ""
    return section("Channel ranges", *([paragraph(words)] if words else []), pairs(drawn))


def _reach(pair: Sequence[Sequence[float | None]]) -> float:
    return max((abs(x) for side in pair for x in side if x is not None), default=0.0)


def _searches(curves: Mapping[str, Record]) -> Raw:
    if not curves:
        return Raw("")
    rows = [(code(site), c.get("best"), len(c["t"])) for site, c in curves.items()]
    listed = table(("site", "chosen t", "candidates"), rows)
    if not plots.available():
        return section("Search for the threshold t", listed)
    some = dict(list(curves.items())[:MOST_CURVES])
    caption = "Loss over t; the orange line is the chosen one."
    if len(some) < len(curves):
        caption += f" The first {len(some)} of {len(curves)} sites; the table has all."
    return section(
        "Search for the threshold t",
        figure(plots.search_curves(some), caption),
        details(f"all {len(curves)} sites", listed),
    )


def _kernels(kernels: Sequence[Record]) -> Raw:
    if not kernels:
        return Raw("")
    counts = kernel_counts(kernels)
    left = [(code(k["site"]), k["kernel"], k["reason"]) for k in kernels if not k["low_bit"]]
    every = [(code(k["site"]), k["kernel"], marked(k["low_bit"], k["low_bit"]), k["reason"]) for k in kernels]
    missed = [Raw("<h3>Not in low bits</h3>"), table(("matmul", "kernel", "why"), left)] if left else []
    return section(
        "Kernels reached",
        paragraph("Read from the graph that the runtime really executes, after its own optimisations."),
        table(("kernel", "matmuls"), list(counts.items())),
        *missed,
        details(f"all {len(kernels)} matmuls", table(("matmul", "kernel", "low bit", "why not"), every)),
    )


def _device(device: Record | None) -> Raw:
    """What was run of a package for another machine, and what was not."""
    if device is None:
        return Raw("")
    rows = [("run", what) for what in device["run"]] + [("not run", what) for what in device["not_run"]]
    verdicts = [(name, v["as_is"], v["fixed_shapes"], v["nodes"], v["partitions"])
                for name, v in device.get("usability", {}).items()]  # fmt: skip
    heads = ("accelerator", "as it is", "with fixed shapes", "nodes it takes", "in parts")
    title = Raw("<h3>What ONNX Runtime says of the phone's accelerators</h3>")
    told = [title, table(heads, verdicts)] if verdicts else []
    return section(
        "On the device",
        paragraph(f"{', '.join(device['ship'])} go to the device: {megabytes(device['bytes'])}."),
        table(("label", "what"), rows),
        *told,
    )


def _skips(entries: Sequence[Record]) -> Raw:
    rows = [
        (e["name"], code(s["site"]), s["reason"], code(s["node"]) if s["node"] else None)
        for e in entries
        for s in e["skips"]
    ]
    if not rows:
        return section("Left alone", paragraph("No pass skipped a place that it looks at."))
    shown = table(("pass", "site", "reason", "node"), rows)
    reasons = collections.Counter((row[0], row[2]) for row in rows)
    counted = [(name, reason, count) for (name, reason), count in reasons.items()]
    return section(
        "Left alone", table(("pass", "reason", "places"), counted), details(f"all {len(rows)} places", shown)
    )


def _inputs(record: Record) -> Raw:
    files = dict(record["source"].get("files") or {})
    files |= (record["calibration"] or {}).get("files") or {}
    files |= (record["tokenizer"] or {}).get("files") or {}
    rows = [(name, f["bytes"], code(f["sha256"])) for name, f in files.items()]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return section(
        "What went in",
        *([table(("file", "bytes", "sha256"), rows)] if rows else []),
        paragraph(
            f"calibration: {record['calibration']['samples']} samples ({record['calibration']['kind']}); "
            f"seed {record['seed']}; {versions}"
        ),
    )
