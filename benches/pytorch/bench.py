#!/usr/bin/env python3
"""What the layer and its training step cost in PyTorch, or whether it computes what a file expects.

    bench.py forward [FILE] ...     a forward pass, as a layer is served: keys normalised once
    bench.py train [FILE] ...       forward, backward and an update of every weight
    bench.py check FILE...          the peer against `expected.*`: a line a tensor, exit 1 on a miss
    bench.py golden -o FILE ...     writes a layer with random weights and what the peer makes of it, for `ultramem check FILE`
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import check
import files
from config import PRESETS, Config
from layer import POOLS, MemoryLayer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
MODES = {mode: [mode] for mode in ("eager", "compile", "graphs")}
MODES |= {"both": ["eager", "compile"], "all": ["eager", "compile", "graphs"]}
OPTIMISERS = ("fused", "foreach", "plain", "sparse")
SIZES = [field.name for field in fields(Config) if field.type == "int"]
WARM_UP = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["forward", "train", "check", "golden"])
    parser.add_argument("file", nargs="*", type=Path, help="a safetensors file of one layer, in place of dimensions")
    parser.add_argument("-o", "--output", type=Path, help="where forward and golden write what they compute")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="where the dimensions that are not given come from")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--tokens", default="256", help="rows of the input: a number, or several with commas between")
    parser.add_argument("--threads", type=int, help="of the processor; without it, as many as PyTorch takes")
    parser.add_argument("--mode", choices=MODES, default="both", help="graphs: compiled, in a CUDA graph; both: eager and compile")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--pool", choices=POOLS, help="how rows are summed; without it, as is fastest; check tries all")
    parser.add_argument("--optimiser", choices=OPTIMISERS, default="fused", help="AdamW's form; sparse: SparseAdam for the table")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    return parser.parse_args()


def configured(args: argparse.Namespace) -> Config:
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    return replace(PRESETS[args.preset], **given)


def made(args: argparse.Namespace) -> tuple[MemoryLayer, Tensor | None]:
    """The layer to measure, of a file with its input, or of dimensions with random weights."""
    torch.manual_seed(1)
    config, tensors = files.read(args.file[0]) if args.file else (configured(args), {})
    with torch.device(args.device):
        layer = MemoryLayer(config, args.pool or "bag", sparse=args.verb == "train" and args.optimiser == "sparse")
    if tensors:
        files.fill(layer, tensors)
    return layer.to(args.device, DTYPES[args.dtype]), tensors.get("input")


def drawn(args: argparse.Namespace, *shape: int) -> Tensor:
    """Numbers in [-1, 1), as `ultramem bench` draws them."""
    return (torch.rand(*shape, device=args.device) * 2 - 1).to(DTYPES[args.dtype])


def compiled(layer: MemoryLayer, mode: str) -> Callable[[Tensor], Tensor]:
    if mode == "eager":
        return layer
    torch._dynamo.reset()
    return torch.compile(layer, dynamic=False, mode="reduce-overhead" if mode == "graphs" else None)


def fastest_pool(args: argparse.Namespace, mode: str) -> str:
    """Bags, but for compiled training: the gradient of a gather and a product is quicker than that of bags, where it need not be sparse."""
    return "product" if args.verb == "train" and mode != "eager" and args.optimiser != "sparse" else "bag"


def forward_step(layer: MemoryLayer, x: Tensor, mode: str) -> Callable[[], object]:
    model = compiled(layer.prepare(), mode)

    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


def train_step(layer: MemoryLayer, x: Tensor, grad_output: Tensor, mode: str, optimiser: str) -> Callable[[], object]:
    """Forward, backward and update. The rate is too small to change a weight much, and that costs no less."""
    model, update = compiled(layer, mode), updates(layer, optimiser)

    def step() -> None:
        (model(x) * grad_output).sum().backward()
        for each in update:
            each.step()
            each.zero_grad(set_to_none=True)

    return step


def updates(layer: MemoryLayer, optimiser: str) -> list[torch.optim.Optimizer]:
    """Dense AdamW for all weights or, if asked for, PyTorch's own lazy Adam for the table."""
    rates = {"lr": 1e-6, "betas": (0.9, 0.95)}
    if optimiser == "sparse":
        others = [weight for name, weight in layer.named_parameters() if name != "values"]
        return [torch.optim.SparseAdam([layer.values], **rates), torch.optim.AdamW(others, **rates, fused=True)]
    form = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}[optimiser]
    return [torch.optim.AdamW(layer.parameters(), **rates, **form)]


def timed(step: Callable[[], object], rounds: int, device: str) -> dict[str, float]:
    """Milliseconds of `step`, under the names that `ultramem bench` gives them."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive") if rounds > 1 else times * 3
    return {"median": median, "lower": lower, "upper": upper, "min": min(times), "max": max(times)}


def measure(args: argparse.Namespace) -> None:
    layer, stored = made(args)
    width = layer.config.hidden_size
    for tokens in map(int, args.tokens.split(",")):
        x = drawn(args, tokens, width) if stored is None else stored.to(args.device, DTYPES[args.dtype])
        for mode in MODES[args.mode]:
            layer.pool_by = args.pool or fastest_pool(args, mode)
            if args.verb == "forward":
                step = forward_step(layer, x, mode)
            else:
                step = train_step(layer, x, drawn(args, *x.shape), mode, args.optimiser)
            show(args, layer, len(x), mode, timed(step, args.rounds, args.device))
        if stored is not None:
            break
    if args.verb == "forward" and args.output:
        files.write(args.output, check.outcome(layer, x))


def show(args: argparse.Namespace, layer: MemoryLayer, tokens: int, mode: str, ms: dict[str, float]) -> None:
    if not args.json:
        range_ = f"{ms['lower']:.3f} to {ms['upper']:.3f}; least {ms['min']:.3f}"
        print(f"{args.verb} {tokens} tokens, {mode}: {ms['median']:.3f} ms ({range_})", flush=True)
        return
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    line = {
        "verb": args.verb, "mode": mode, "tokens": tokens, "ms": ms, "device": device, "dtype": args.dtype,
        "threads": torch.get_num_threads(), "rounds": args.rounds, "pool": layer.pool_by, "torch": torch.__version__, "dimensions": layer.config.dimensions(),
    }
    if args.verb == "train":
        line["optimiser"] = args.optimiser
    print(json.dumps(line), flush=True)


def check_files(args: argparse.Namespace) -> bool:
    """Whether all is within bounds."""
    passed = True
    for path in args.file:
        config, tensors = files.read(path)
        for pool in [args.pool] if args.pool else POOLS:
            layer = MemoryLayer(config, pool)
            files.fill(layer, tensors)
            for line in check.compare(layer, tensors):
                passed &= line.passed
                if args.json:
                    print(json.dumps({"file": str(path), "pool": pool, **line._asdict(), "passed": line.passed}))
                else:
                    print(f"{path.stem} {pool} {line.name}: {line.value:.1e}, at most {line.bound:.0e}{'' if line.passed else ' MISSED'}")
    return passed


def write_golden(args: argparse.Namespace) -> None:
    layer, _ = made(args)
    shape = int(args.tokens), layer.config.hidden_size
    tensors = check.golden(layer, drawn(args, *shape), drawn(args, *shape))
    files.write(args.output, tensors, layer.config.metadata())


def main() -> int:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.verb == "check":
        return 0 if check_files(args) else 1
    if args.verb == "golden":
        write_golden(args)
    else:
        measure(args)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, KeyError, ValueError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
