"""Compares the layer of a file with the file's `expected.*` tensors, and makes such files for `ultramem check`."""

from __future__ import annotations

from typing import Iterator, NamedTuple

import torch
from torch import Tensor

import files
from config import Config
from layer import Kept, MemoryLayer

OUTPUT_BOUND = 1e-5
GRADIENT_BOUND = 1e-4


class Line(NamedTuple):
    """A tensor that was expected: its relative L2, or the share of slots that differ, and what is allowed."""

    name: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.value <= self.bound


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def in_order(kept: Kept, config: Config) -> Kept:
    """The kept of each head with the largest total first and, of equal totals, the smaller slot; that is how files have them."""
    tokens = kept.slots.shape[0]
    slots = kept.slots.view(tokens, config.heads, config.top_m)
    scores = kept.scores.view(tokens, config.heads, config.top_m, config.cores)
    by_slot = slots.argsort(2)
    totals = scores.sum(3).gather(2, by_slot)
    order = by_slot.gather(2, totals.argsort(dim=2, descending=True, stable=True))
    scores = scores.gather(2, order[..., None].expand(-1, -1, -1, config.cores))
    return Kept(slots.gather(2, order).flatten(1), scores.flatten(1, 2))


def outcome(layer: MemoryLayer, x: Tensor) -> dict[str, Tensor]:
    """What `ultramem forward` writes."""
    with torch.no_grad():
        kept = in_order(layer.retrieve(x), layer.config)
        return {"output": layer(x), "indices": kept.slots, "scores": kept.scores}


def backward(layer: MemoryLayer, x: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """What `ultramem backward` writes: the gradients of the sum of output times `grad_output`."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    (layer(x) * grad_output).sum().backward()
    grads = {f"grad.{name}": grad for name, grad in files.gradients(layer).items()}
    return {"grad_input": x.grad, **grads}


def differing(found: Tensor, expected: Tensor, heads: int) -> float:
    """The share of slots that a head keeps in one and not in the other."""
    both = [slots.view(-1, heads, slots.shape[1] // heads).sort(2).values for slots in (found, expected)]
    shared = (both[0][..., None] == both[1][:, :, None]).any(3)
    return 1.0 - float(shared.double().mean())


def compare(layer: MemoryLayer, tensors: files.Tensors) -> Iterator[Line]:
    """A line for each expected tensor that this peer computes."""
    found = outcome(layer, tensors["input"])
    if "grad_output" in tensors:
        found |= backward(layer, tensors["input"], tensors["grad_output"])
    for name, expected in tensors.items():
        tensor = found.get(name.removeprefix("expected.")) if name.startswith("expected.") else None
        if tensor is None:
            continue
        if name == "expected.output":
            yield Line("expected.output, served", relative_l2(served(layer, tensors["input"]), expected), OUTPUT_BOUND)
        if name == "expected.indices":
            yield Line(name, differing(tensor, expected, layer.config.heads), 1e-3)
        else:
            bound = GRADIENT_BOUND if "grad" in name else OUTPUT_BOUND
            yield Line(name, relative_l2(tensor.reshape(expected.shape), expected), bound)


def served(layer: MemoryLayer, x: Tensor) -> Tensor:
    """The output of the layer with its keys prepared, scored by projected keys."""
    layer.few_tokens = len(x)
    with torch.inference_mode():
        return layer.prepare()(x)


def golden(layer: MemoryLayer, x: Tensor, grad_output: Tensor) -> files.Tensors:
    """A file's tensors: the layer, an input, and what this peer makes of it."""
    found = outcome(layer, x) | backward(layer, x, grad_output)
    expected = {f"expected.{name}": tensor for name, tensor in found.items()}
    return {**files.layer_tensors(layer), "input": x, "grad_output": grad_output, **expected}
