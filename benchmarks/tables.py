"""Results as Markdown."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]
TITLES = {"minilm": "MiniLM (all-MiniLM-L6-v2)", "smollm2": "SmolLM2 (SmolLM2-135M-Instruct)", "operators": "Operators"}

# kinds, or files, that stand on pages of their own
PAGES = ("integer_operators", "kernels", "cuda_kernels", "mobile", "smollm2_decode_tvm", "targets", "training")


def committed(name: str, folder: Path = RESULTS) -> str:
    """The committed table of a file that stands on a page of its own."""
    return render(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def all_results(folder: Path = RESULTS) -> str:
    """Every committed table of a model, with its heading."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["kind"] in PAGES or path.stem in PAGES:
            continue
        parts.append(f"### {TITLES[result['model']]}: {result['kind']}\n\n{render(result)}")
    return "\n\n".join(parts)


def render(result: Mapping[str, Any]) -> str:
    """One result: its table, and what must be known to read it."""
    draw = {
        "accuracy": accuracy, "speed": speed, "cost": cost, "decode": decode, "integer_operators": integer_operators,
        "kernels": kernels,
        "cuda_kernels": cuda_kernels, "mobile": mobile, "targets": targets,
    }[result["kind"]]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commands = dict.fromkeys(f"`{row['command']}`" for row in result["rows"])
    return f"{draw(result)}\n\n{_machines(result)}; {versions}. {', '.join(commands)}"


def _machines(result: Mapping[str, Any]) -> str:
    """Where the rows were measured: the rows of each machine by their place, where there is more than one."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(result["rows"], 1):
        places[row.get("machine", result["machine"])].append(place)
    if len(places) < 2:
        return next(iter(places), result["machine"])
    return "; ".join(f"rows {_spans(rows)}: {machine}" for machine, rows in places.items())


def _spans(numbers: Sequence[int]) -> str:
    """Rising numbers as spans: 1-3, 5."""
    spans: list[list[int]] = []
    for one in numbers:
        if spans and one == spans[-1][1] + 1:
            spans[-1][1] = one
        else:
            spans.append([one, one])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def accuracy(result: Mapping[str, Any]) -> str:
    """One row a program, then the exceptions that a gate made."""
    head = (
        result["metric"], "calibration", "score", "CPU s", "peak MB", "file MB",
        "kernels of the products", "static int8 / block linears",
    )  # fmt: skip
    rows = [_accuracy_row(row, result["digits"]) for row in result["rows"]]
    text = table(head, rows)
    if result["limit"]:
        text += f"\n\n**Not the protocol:** only the first {result['limit']} windows or pairs."
    notes = [note for row in result["rows"] if (note := _exceptions(row))]
    return "\n\n".join([text, *notes])


def _accuracy_row(row: Row, digits: int) -> Iterable[str]:
    if row["error"]:
        spent = number(row["cpu_seconds"]), number(row["peak_mb"])
        return row["name"], row["calibration"], f"no result: {row['error']}", *spent, "", "", ""
    kernels = ", ".join(f"{count} {name}" for name, count in row["kernels"].items())
    linears = row["linears"]
    share = f"{linears['static_int8']} / {linears['block']}" if linears else ""
    return (
        row["name"], row["calibration"], f"{row['value']:.{digits}f}", number(row["cpu_seconds"]),
        number(row["peak_mb"]), f"{row['file_mb']:.1f}", kernels, share,
    )  # fmt: skip


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _exceptions(row: Row) -> str:
    """The linears that a gate kept in a higher precision, by that precision."""
    by_scheme: dict[str, list[str]] = defaultdict(list)
    for name, scheme in row["exceptions"].items():
        by_scheme[scheme].append(name)
    texts = [f"{scheme}: {', '.join(_by_layer(names))}" for scheme, names in by_scheme.items()]
    return f"Exceptions of {row['name']} ({row['calibration']}): {'; '.join(texts)}." if texts else ""


def _by_layer(names: Sequence[str]) -> list[str]:
    """``layers.1.down, layers.2.down`` -> ``layers.*.down`` of 1, 2: one entry for names that differ in one number."""
    found: dict[str, list[int]] = defaultdict(list)
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        if number is None:
            found[name] = []
        else:
            found[f"{name[: number.start()]}*{name[number.end() :]}"].append(int(number[0]))
    return [f"`{name}`" + (f" of {', '.join(map(str, sorted(held)))}" if held else "") for name, held in found.items()]


def speed(result: Mapping[str, Any]) -> str:
    """One table a shape: each program against the float export, and the roofline's bounds."""
    parts = []
    for row in result["rows"]:
        shape = f"batch {row['batch']}, {row['tokens']} tokens"
        times = ("min ms", "median ms", "median CPU ms")
        head = (shape, *times, "ratio of minima", "ratio of medians", "ratio of CPU medians")
        base = row["programs"][0]
        lines = [_speed_line(program, base) for program in row["programs"]]
        lines += [_bound_line(bound, base) for bound in row["bounds"]]
        load = f"{row['rounds']} rounds in turns, {result['threads']} thread, load average {row['load']:.1f}"
        parts.append(f"{table(head, lines)}\n\n{load}.")
    return "\n\n".join(parts)


def _speed_line(program: Row, base: Row) -> Sequence[str]:
    kinds = ("min_ms", "median_ms", "cpu_ms")
    ratios = (base[kind] / program[kind] for kind in kinds)
    return program["name"], *(f"{program[kind]:.2f}" for kind in kinds), *(f"{r:.2f}" for r in ratios)


def _bound_line(bound: Row, base: Row) -> Sequence[str]:
    return bound["name"], f"{bound['ms']:.2f}", "", "", f"{base['min_ms'] / bound['ms']:.2f}", "", ""


def decode(result: Mapping[str, Any]) -> str:
    """One row a program: time of a token behind the context, ratios to the float export, and its cache."""
    shape = f"{result['context']} tokens before, {result['tokens']} timed"
    head = (shape, "min ms", "median ms", "tokens/s (median)", "ratio of minima", "ratio of medians",
            "cache bytes/token", "file MB", "perplexity")  # fmt: skip
    base = result["rows"][0]
    lines = [_decode_line(row, base) for row in result["rows"]]
    how = f"Token by token in turns, {result['threads']} thread, load average {base['load']:.1f}."
    text = f"{table(head, lines)}\n\n{how}"
    if result["windows"]:
        text += f" Perplexity over the first {result['windows']} windows, read in pieces through the cache."
    return text


def _decode_line(row: Row, base: Row) -> Sequence[str]:
    low, middle = row["min_ms"], row["median_ms"]
    score = "" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
    return (
        row["name"], f"{low:.2f}", f"{middle:.2f}", f"{1e3 / middle:.1f}", f"{base['min_ms'] / low:.2f}",
        f"{base['median_ms'] / middle:.2f}", number(row["cache_bytes"]), f"{row['file_mb']:.1f}", score,
    )  # fmt: skip


def cost(result: Mapping[str, Any]) -> str:
    """One row an observer: peak memory at each number of samples, and how much it grew."""
    counts = result["samples"]
    columns = [f"{what}, {count} samples" for what in ("CPU s", "peak MB") for count in counts]
    head = ("observer", *columns, "growth")
    lines = []
    for row in result["rows"]:
        if row["error"]:
            lines.append((row["name"], f"no result: {row['error']}", *[""] * (2 * len(counts))))
            continue
        peaks = row["peak_mb"]
        growth = f"{100 * (peaks[-1] / peaks[0] - 1):+.1f} %"
        lines.append((row["name"], *map(number, row["cpu_seconds"]), *map(number, peaks), growth))
    return table(head, lines)


def integer_operators(result: Mapping[str, Any]) -> str:
    """One row a variant of an operator: its largest error, and its time against the float operator's."""
    head = ("operator", "variant", "largest error", "body, ms", "float operator, ms", "ratio of minima")
    lines = []
    for row in result["rows"]:
        times = ("", "", "")
        if row["ms"] is not None:
            times = f"{row['ms']:.2f}", f"{row['float_ms']:.2f}", f"{row['ms'] / row['float_ms']:.1f}"
        lines.append((row["operator"], row["variant"], f"{row['max_error']:.2g}", *times))
    base = result["rows"][0]
    how = f"{base['rounds']} rounds in turns, {result['threads']} thread, load average {base['load']:.1f}."
    return f"{table(head, lines)}\n\n{how}"


def kernels(result: Mapping[str, Any]) -> str:
    """One table a shape: every kernel against float32, its peer of ONNX Runtime and the processor's bound."""
    parts = []
    for row in result["rows"]:
        ratios = [f"times {other} ({kind})" for other in ("float32", "its peer") for kind in ("minima", "CPU")]
        head = (row["shape"], "min ms", "median ms", "median CPU ms", *ratios, "share of the bound")
        by_name = {line["name"]: line for line in row["lines"]}
        lines = [_kernel_line(line, row["lines"][0], by_name.get(line["peer"])) for line in row["lines"]]
        how = f"{row['rounds']} rounds in turns, {result['threads']} thread, load average {row['load']:.1f}."
        parts.append(f"{table(head, lines)}\n\n{how}")
    return "\n\n".join(parts)


def _kernel_line(line: Row, base: Row, peer: Row | None) -> Sequence[str]:
    kinds = ("min_ms", "cpu_ms")
    against = [f"{peer[kind] / line[kind]:.2f}" if peer else "" for kind in kinds]
    share = "" if line["bound_ms"] is None else f"{line['bound_ms'] / line['min_ms']:.2f}"
    return (
        line["name"], *(f"{line[kind]:.3f}" for kind in ("min_ms", "median_ms", "cpu_ms")),
        *(f"{base[kind] / line[kind]:.2f}" for kind in kinds), *against, share,
    )  # fmt: skip


def cuda_kernels(result: Mapping[str, Any]) -> str:
    """One row a kernel, shape and architecture."""
    head = ("kernel", "shape", "architecture", "registers", "shared bytes", "spilled bytes", "instructions",
            "of them", "bytes alone, us", "operations alone, us")  # fmt: skip
    lines = []
    for row in result["rows"]:
        used = row["resources"]
        counted = ", ".join(f"{count} {name}" for name, count in row["instructions"].items())
        lines.append((
            f"`{row['kernel']}`", row["shape"], f"{row['architecture']} ({row['gpu']})", str(used["registers"]),
            number(used["shared"]), str(used["spilled"]), number(row["size"]), counted,
            f"{row['memory_us']:.1f}", f"{row['unit_us']:.1f}",
        ))  # fmt: skip
    return f"{table(head, lines)}\n\nCompiled by {result['rows'][0]['compiler']}, not run."


def targets(result: Mapping[str, Any]) -> str:
    """One row a model, recipe and target: what compiling cost, and the outputs beside the `cpu` program's."""
    head = ("model", "recipe", "target", "s", "CPU s", "peak MB", "MB", "matmuls in low bits", "kernels",
            "outputs beside `cpu`: largest error / largest value, same top 1")  # fmt: skip
    lines = [_target_line(row) for row in result["rows"]]
    loads = [row["load"] for row in result["rows"]]
    how = (
        f"Compiled by the command line with {result['samples']} calibration samples, "
        f"load average {min(loads):.1f} to {max(loads):.1f}. SmolLM2: {result['context']} tokens at once, then "
        f"{result['tokens']} one at a time."
    )
    return f"{table(head, lines)}\n\n{how}"


def _target_line(row: Row) -> Sequence[str]:
    named = row["model"], row["name"], f"`{row['target']}`"
    cost = number(row["seconds"]), number(row["cpu_seconds"]), number(row["peak_mb"])
    if "mb" not in row:
        return *named, *cost, "", "", "", f"no result: {row['error']}"
    kernels = ", ".join(f"{count} {name}" for name, count in row["kernels"].items())
    found = "; ".join(_stage(name, stage) for name, stage in row["compared"].items())
    share = f"{row['low_bit']} / {sum(row['kernels'].values())}"
    return *named, *cost, f"{row['mb']:.1f}", share, kernels, found or _checked(row)


def _checked(row: Row) -> str:
    """What the compiler itself saw of a program for a machine that is not here."""
    if not row.get("run"):
        return f"not compared: {row['error']}"
    ours, theirs = row["sqnr_db"]
    return f"not run here; {row['run'][0]}: {ours:.1f} dB from the float model, `cpu` {theirs:.1f}"


def _stage(name: str, stage: Row) -> str:
    if stage["exact"]:
        return f"{name}: the same bits"
    return f"{name}: {stage['error']:.2g} / {stage['reach']:.3g}, {100 * stage['same']:.1f} %"


def mobile(result: Mapping[str, Any]) -> str:
    """One row a package: what ships, file by file, against the packed weights."""
    head = ("model", "recipe", "target", "ships, bytes", "of them", "packed weights, bytes", "ratio")
    lines = []
    for row in result["rows"]:
        size = sum(row["shipped"].values())
        files = ", ".join(f"{name} {number(one)}" for name, one in row["shipped"].items())
        lines.append((
            row["model"], f"`{row['recipe']}`", f"`{row['target']}`", number(size), files, number(row["packed"]),
            f"{size / row['packed']:.3f}",
        ))  # fmt: skip
    return table(head, lines)


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a ``|`` in a cell is escaped."""
    lines = [list(head), ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
