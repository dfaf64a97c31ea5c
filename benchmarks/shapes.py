"""The reference run on shapes: ``python -m benchmarks.shapes`` from the repository's root.

Every arm and seed is one ``lmms-eval`` command. What it gave is kept in ``results/shapes/<arm>-seed<k>.json``; a run
whose file is there is not repeated. At the end the tables in README.md and results/README.md are written anew from
these files; ``--render`` does that alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "results" / "shapes"

ARMS: Final = {
    "zero-shot": "method=none",
    "1-shot": "method=none,shots=1",
    "4-shot": "method=none,shots=4",
    "8-shot": "method=none,shots=8",
    "random heads": "method=random",
    "MTV": "method=mtv",
}
GROUPS: Final = ("shapes", "shapes_hard")

Run = dict[str, Any]


def run(arm: str, seed: int) -> Run:
    """One evaluation of both groups, by the harness's own command."""
    arguments = f"pretrained=tiny,seed={seed},{ARMS[arm]}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lmms_eval", "--model", "mtv", "--model_args", arguments]
        command += ["--tasks", ",".join(GROUPS), "--batch_size", "16", "--output_path", folder]
        began = time.perf_counter()
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        (results,) = (json.loads(path.read_text()) for path in Path(folder).rglob("*_results.json"))
        (record,) = (json.loads(path.read_text()) for path in Path(folder).rglob("*_mtv.json"))
    tasks = {}
    for task, used in sorted(record["tasks"].items()):
        scores = results["results"][task]
        tasks[task] = {
            "score": scores["exact_match,none"],
            "stderr": scores["exact_match_stderr,none"],
            "n": results["n-samples"][task]["effective"],
        } | {key: used[key] for key in ("method", "vector", "heads", "shots", "settings", "loss", "fit_seconds")}
        tasks[task]["evaluation"] = used["evaluation"]
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "device": "cpu"}
    return {
        "arm": arm,
        "model_args": arguments,
        "seed": seed,
        "model": {key: record["model"][key] for key in ("name", "revision", "dtype")},
        "versions": record["versions"],
        "hardware": hardware,
        "seconds": seconds,
        "tasks": tasks,
    }


def stored(folder: Path = RESULTS) -> list[Run]:
    """All runs in ``folder``, in the order of the arms and seeds."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*-seed*.json")]
    return sorted(runs, key=lambda found: (list(ARMS).index(found["arm"]), found["seed"]))


def mean_score(found: Run, hard: bool) -> float:
    """Mean score over the tasks of one group."""
    return statistics.mean(task["score"] for name, task in found["tasks"].items() if ("labels" in name) == hard)


def _spread(values: Sequence[float], digits: int = 3) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def summary(runs: Sequence[Run]) -> str:
    """One row for each arm: accuracy over seeds, tokens of a prompt, seconds of a fit."""
    lines = [
        "| arm | shapes, mean of 9 tasks | worst task | shapes_hard, mean of 2 | tokens per prompt | fit, s per task |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        mine = [found for found in runs if found["arm"] == arm]
        if not mine:
            continue
        tasks = [task for found in mine for name, task in found["tasks"].items() if "labels" not in name]
        names = sorted({name for found in mine for name in found["tasks"] if "labels" not in name})
        worst = min(statistics.mean(found["tasks"][name]["score"] for found in mine) for name in names)
        fits = statistics.median(task["fit_seconds"] for task in tasks)
        cells = [
            arm,
            _spread([mean_score(found, hard=False) for found in mine]),
            f"{worst:.3f}",
            _spread([mean_score(found, hard=True) for found in mine]),
            f"{statistics.mean(task['evaluation']['input_tokens'] for task in tasks):.0f}",
            f"{fits:.1f}" if tasks[0]["loss"] else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = sorted({found["seed"] for found in runs})
    versions = runs[0]["versions"]
    lines += [
        "",
        f"Exact match, mean ± standard deviation over seeds {', '.join(map(str, seeds))}; 200 scenes a task. The seed "
        "draws demonstrations, masks and random heads; zero-shot does not depend on it. "
        f"{runs[0]['hardware']['cores']} CPU cores; "
        + ", ".join(f"{name} {versions[name]}" for name in ("lmms-eval", "torch", "transformers"))
        + ".",
    ]
    return "\n".join(lines)


def by_task(runs: Sequence[Run]) -> str:
    """One row for each task, one column for each arm: accuracy over seeds."""
    arms = [arm for arm in ARMS if any(found["arm"] == arm for found in runs)]
    lines = ["| task | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for name in runs[0]["tasks"]:
        cells = (_spread([found["tasks"][name]["score"] for found in runs if found["arm"] == arm]) for arm in arms)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def inserted(text: str, tables: Mapping[str, str]) -> str:
    """``text`` with each table between its two marks."""
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda found, table=table: found[1] + table + found[2], text, flags=re.DOTALL)
        if not count:
            raise ValueError(f"no place for the table {name!r}: <!-- {name} --> ... <!-- /{name} --> is missing")
    return text


def pages(runs: Sequence[Run]) -> dict[Path, str]:
    """The pages with tables, as they have to be."""
    tables = {ROOT / "README.md": {"shapes": summary(runs)}}
    tables[ROOT / "results" / "README.md"] = {"shapes": summary(runs), "shapes by task": by_task(runs)}
    return {path: inserted(path.read_text(encoding="utf-8"), found) for path, found in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--render", action="store_true", help="only write the tables anew")
    given = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for arm in () if given.render else given.arms:
        for seed in given.seeds:
            path = RESULTS / f"{arm.replace(' ', '-')}-seed{seed}.json"
            if not path.exists():
                found = run(arm, seed)
                path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                sys.stderr.write(f"{path.name}: {mean_score(found, hard=False):.3f} in {found['seconds']:.0f} s\n")
    for path, text in pages(stored()).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
