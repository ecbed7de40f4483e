"""Work whose CPU time and peak memory are measured: each job is a process of its own."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.protocol import PROTOCOLS, Arrays, read_calibration

ROOT = Path(__file__).parents[1]
LONGEST_ERROR = 160  # letters in a table


@dataclasses.dataclass(frozen=True)
class Finished:
    """``result`` of the job, or ``error``: its last line. Peak memory counts the mapped files in it."""

    result: dict[str, Any]
    cpu_seconds: float
    peak_mb: float | None
    error: str = ""


def run_job(name: str, **arguments: Any) -> Finished:
    """Run job ``name`` of this file to its end; its output is shown only when it fails."""
    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        with log.open("wb") as output:
            given = json.dumps(arguments, default=str)
            command = [sys.executable, "-m", "benchmarks.jobs", name, given, str(result)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            try:
                _, status, usage = os.wait4(process.pid, 0)  # this process alone, not all that came before
            except BaseException:
                process.kill()
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = usage.ru_utime + usage.ru_stime
        if process.returncode == 0:
            return Finished(**json.loads(result.read_text()), cpu_seconds=seconds)
        text = log.read_text(errors="replace")
        print(text[-4000:], file=sys.stderr)
        return Finished({}, seconds, None, error=_last_line(text, process.returncode))


def _last_line(text: str, code: int) -> str:
    """The reason without the paths of this machine."""
    told = [line.strip() for line in text.splitlines()]
    lines = [line for line in told if line and not line.startswith(("hint:", "where:"))]
    plain = re.sub(r"(?<![\w/])(/[\w.+-]+)+/", "", lines[-1] if lines else "")
    return plain[:LONGEST_ERROR] or f"ended with status {code}"


# --------------------------------------------------------------------------- the jobs


def compile_model(model: str, out: str, calibration: str, **settings: Any) -> dict[str, Any]:
    """``qcompile.compile``, saved to ``out``; what the tables say of the compilation itself."""
    import qcompile
    from qcompile.recipe import Recipe

    recipe = settings.pop("recipe")
    chosen = recipe if isinstance(recipe, str) else Recipe.model_validate(recipe)
    options = settings | {"output": out, "force": True, "calibration": calibration}
    with qcompile.compile(model, recipe=chosen, **options) as compiled:
        record = compiled.manifest
    sites = [site for entry in record["passes"] if entry["name"] == "quantise" for site in entry["sites"]]
    low_bit = {kernel["site"] for kernel in record["kernels"] if kernel["low_bit"]}
    linears = {
        site["site"]: {"activations": site["activations"], "low_bit": site["site"] in low_bit}
        for site in sites
    }
    return {"linears": linears, "gate": record["gate"]}


def quantise_with_peer(peer: str, model: str, out: str, calibration: str) -> dict[str, Any]:
    """Another quantiser's program at ``out``."""
    from benchmarks.peers import PEERS

    PEERS[peer][2](Path(model), read_calibration(Path(calibration)), Path(out))
    return {}


def score(bench: str, program: str, data: str, tokenizer: str, limit: int | None) -> dict[str, Any]:
    """The metric of ``program``, the kernels that its products reach and the bytes of its files."""
    from qcompile import backends
    from qcompile.calibration.library import library_beside
    from qcompile.calibration.runner import open_session
    from qcompile.intake import external_files

    path = Path(program)
    session = open_session(path, library=library_beside(path))
    wanted = {i.name for i in session.get_inputs()}

    def run(feeds: Arrays) -> Any:
        return session.run(None, {name: array for name, array in feeds.items() if name in wanted})[0]

    value = PROTOCOLS[bench](Path(data), Path(tokenizer)).score(run, limit)
    kernels = collections.Counter(kernel["kernel"] for kernel in backends.by_name("cpu").kernels_of(path))
    size = sum(file.stat().st_size for file in (path, *external_files(path)))
    return {"value": value, "kernels": dict(sorted(kernels.items())), "file_mb": size / 1e6}


def command(words: list[str]) -> dict[str, Any]:
    """``qcompile`` on the command line."""
    from qcompile import cli

    start = time.perf_counter()
    code = cli.main(words)
    if code:
        raise SystemExit(code)
    return {"seconds": time.perf_counter() - start}


def compare(
    program: str, reference: str, bench: str, data: str, tokenizer: str, samples: int, context: int, tokens: int
) -> dict[str, Any]:
    """The outputs of two programs on the same inputs, stage by stage."""
    from benchmarks import outputs

    held = PROTOCOLS[bench](Path(data), Path(tokenizer))
    feeds = outputs.inputs(held, samples, context, tokens)
    both = [outputs.of(Path(path), feeds) for path in (reference, program)]
    return {stage: outputs.difference(*(found[stage] for found in both)) for stage in both[0]}


JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "compile": compile_model,
    "peer": quantise_with_peer,
    "score": score,
    "command": command,
    "compare": compare,
}


def peak_mb() -> float:
    """The most memory that this process has held.

    Linux's ``ru_maxrss`` starts at the peak of the process that started this one; its VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("arguments", help="keyword arguments as JSON")
    parser.add_argument("result", type=Path, help="file to write the result to, as JSON")
    options = parser.parse_args()
    result = JOBS[options.job](**json.loads(options.arguments))
    options.result.write_text(json.dumps({"result": result, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()
