"""Layers in safetensors files, under the names and in the shapes of checkpoints: what `ultramem forward`, `backward` and `check` take."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from config import Config
from layer import MemoryLayer

Tensors = dict[str, Tensor]

NAMES = {
    "query_proj": "query_proj.weight",
    "query_norm": "query_norm.weight",
    "keys": "keys",
    "keys_norm": "keys_norm.weight",
    "values": "values_for_look_up",
    "values_proj": "values_proj.weight",
    "gate_proj": "swilu_projection.weight",
}
"""A weight's name in a file, by its name here; the cores are a tensor each."""


def name_of(weight: str, config: Config) -> str:
    """Memory+ keeps its table in a module that layers share."""
    shared = config.kind == "memory_plus" and weight == "values"
    return f"full_memory_layer.{NAMES[weight]}" if shared else NAMES[weight]


def to_file(name: str, tensor: Tensor, config: Config) -> Tensor:
    """The weight `name`, or its gradient, in the shape that files have."""
    if name == "keys":
        return keys_to_file(tensor, config)
    return tensor.view(config.rows, config.value_dim) if name == "values" else tensor


def keys_to_file(keys: Tensor, config: Config) -> Tensor:
    """From `[2, heads, rank, side_keys, key_dim]` to `[heads, 2, side_keys, key_dim, rank]`, or without the rank."""
    turned = keys.permute(1, 0, 3, 4, 2)
    return turned if config.tucker else turned[..., 0]


def keys_from_file(keys: Tensor, config: Config) -> Tensor:
    return (keys if config.tucker else keys[..., None]).permute(1, 0, 4, 2, 3)


def learned(weights: dict[str, Tensor | None], config: Config) -> Tensors:
    """Weights, or their gradients, under the names of files."""
    tensors = {}
    for name, tensor in weights.items():
        if tensor is None:
            continue
        if name == "cores":
            tensors |= {f"tucker_core.{core}": part for core, part in enumerate(tensor)}
        else:
            tensors[name_of(name, config)] = to_file(name, tensor, config)
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def gradients(layer: MemoryLayer) -> Tensors:
    """The gradient of each weight that has one."""
    of = {name: weight.grad for name, weight in layer.named_parameters()}
    return learned({name: grad.to_dense() if grad is not None else None for name, grad in of.items()}, layer.config)


# A machine with a GPU and a PyTorch may lack safetensors, and measures without files: they are imported where they are needed.


def read(path: Path) -> tuple[Config, Tensors]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        config = Config.from_metadata(file.metadata() or {})
        return config, {name: file.get_tensor(name) for name in file.keys()}


def fill(layer: MemoryLayer, tensors: Tensors) -> None:
    """Gives `layer` a file's weights."""
    config = layer.config
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name == "cores":
                weight.copy_(torch.stack([tensors[f"tucker_core.{core}"] for core in range(config.cores)]))
            else:
                stored = tensors[name_of(name, config)]
                weight.copy_(keys_from_file(stored, config) if name == "keys" else stored.view(weight.shape))
        if config.tucker:
            vectors = [tensors[f"tucker_core_{side}"].view(config.heads, config.tucker_rank) for side in "uv"]
            layer.core_uv.copy_(torch.stack(vectors))
            layer.shuffle_index.copy_(tensors["shuffle_index"])


def layer_tensors(layer: MemoryLayer) -> Tensors:
    """All tensors of a file of `layer`."""
    config = layer.config
    tensors = learned(dict(layer.named_parameters()), config)
    if config.tucker:
        shape = (1, config.heads, 1, config.tucker_rank)
        tensors |= {f"tucker_core_{side}": layer.core_uv[at].float().cpu().reshape(shape).clone() for at, side in enumerate("uv")}
        tensors["shuffle_index"] = layer.shuffle_index.cpu()
    elif not config.normalises_keys:
        # Not used, and yet in such a file.
        tensors["keys_norm.weight"] = torch.ones(config.key_dim)
    return tensors


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
