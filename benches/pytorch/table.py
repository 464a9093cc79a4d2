#!/usr/bin/env python3
"""The table of scripts/bench-pytorch, of the results in a folder: SIDE-CASE-ROUND.json, of the sides peer, ours and alone (ours on one
thread). Reads the cases from stdin, a line each: name, verb, bar, goal, flags.

usage: table.py FOLDER ROUNDS THREADS
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

SCALING = (1.6, 1.8)
DEMO_MS = (20.0, 10.0)

Times = dict[str, list[float]]


def results(folder: Path, side: str, name: str, rounds: int) -> list[list[dict]]:
    """What each round printed: objects, one or several."""
    found = []
    for at in range(rounds):
        path = folder / f"{side}-{name}-{at}.json"
        if path.exists():
            text = path.read_text()
            lines = text.splitlines() if side == "peer" else [text]
            found.append([json.loads(line) for line in lines])
    return found


def ours_ms(report: dict, verb: str) -> float:
    """The median of a forward pass, or the sum of a training step's parts."""
    if verb == "forward":
        return report["forward_ms"]["median"]
    parts = [report["stages"][part]["ms"]["median"] for part in ("backward", "update")]
    return report["forward_ms"]["median"] + sum(parts)


def medians(folder: Path, name: str, verb: str, rounds: int) -> Times:
    """Milliseconds of each side and mode, a median a round."""
    times: Times = {}
    for lines in results(folder, "peer", name, rounds):
        for line in lines:
            times.setdefault(line["mode"], []).append(line["ms"]["median"])
    for side in ("ours", "alone"):
        for (report,) in results(folder, side, name, rounds):
            times.setdefault(side, []).append(ours_ms(report, verb))
    return times


def shown(times: list[float] | None) -> str:
    """The median of the rounds, and their range."""
    return f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})" if times else "-"


def verdict(value: float, bar: float, goal: float, less: bool = False) -> str:
    sign = -1 if less else 1
    if sign * value >= sign * goal:
        return "goal"
    return "bar" if sign * value >= sign * bar else "BELOW"


def row(name: str, verb: str, asked: tuple[float, float], times: Times) -> list[str]:
    better = min(statistics.median(times[mode]) for mode in ("eager", "compile"))
    ratio = better / statistics.median(times["ours"])
    bar, goal = asked
    end = [f"{ratio:.2f} x", f"{bar:g} x", f"{goal:g} x", verdict(ratio, bar, goal)]
    return [f"{name}, {verb}", *(shown(times[of]) for of in ("eager", "compile", "ours")), *end]


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]) for first, *rest in rows)
    return "\n".join(lines)


def other_bars(folder: Path, rounds: int, threads: int, measured: list[tuple[str, Times]]) -> list[str]:
    """A line for each bar that is not set against PyTorch."""
    lines = []
    for name, times in measured:
        if "alone" in times:
            gain = statistics.median(times["alone"]) / statistics.median(times["ours"])
            end = f": bar {SCALING[0]:g} x, goal {SCALING[1]:g} x: {verdict(gain, *SCALING)}" if threads == 2 else ""
            lines.append(f"from 1 to {threads} threads, {name}: {gain:.2f} x of {shown(times['alone'])} ms{end}")
    demo = [report["forward_ms"]["median"] for (report,) in results(folder, "ours", "demo", rounds)]
    if demo:
        end = verdict(statistics.median(demo), *DEMO_MS, less=True)
        lines.append(f"the demo's forward, 1,024 tokens: {shown(demo)} ms: bar {DEMO_MS[0]:g}, goal {DEMO_MS[1]:g}: {end}")
    return lines


def main() -> None:
    folder, rounds, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rows = [["medians in ms, and the rounds' range", "eager", "compiled", "ours", "ratio", "bar", "goal", "reached"]]
    measured, versions = [], set()
    for line in sys.stdin:
        name, verb, bar, goal = line.split()[:4]
        times = medians(folder, name, verb, rounds)
        if times:
            rows.append(row(name, verb, (float(bar), float(goal)), times))
            measured.append((name, times))
            versions |= {each["torch"] for lines in results(folder, "peer", name, rounds) for each in lines}
    if len(rows) > 1:
        print(f"PyTorch {', '.join(versions)}, {threads} threads, f32; ratio: the better of PyTorch's two over ours")
        print(aligned(rows))
    for line in other_bars(folder, rounds, threads, measured):
        print(line)


if __name__ == "__main__":
    main()
