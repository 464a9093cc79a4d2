"""The layer in PyTorch, stage by stage: query, score, combine, expand, project.

Weights lie as is best for PyTorch, not as files have them (files.py turns them): keys are `[2, heads, tucker_rank, side_keys,
key_dim]`, so that norms run over contiguous numbers and one batched product scores both sides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config

POOLS = ("bag", "product", "scatter")


class Kept(NamedTuple):
    """What retrieval keeps of each token: slots `[tokens, heads * top_m]` and scores `[tokens, heads * top_m, cores]`."""

    slots: Tensor
    scores: Tensor


def normal(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


def leading_vectors(core: Tensor) -> Tensor:
    """The leading singular vectors u and v of each head's summed core, `[2, heads, tucker_rank]`, signed so that u sums to a
    positive number: of a matrix without negative numbers, neither has one."""
    left, _, right = torch.linalg.svd(core)
    u, v = left[..., 0], right[:, 0]
    return torch.stack([u, v]) * u.sum(1).sign()[:, None]


class MemoryLayer(nn.Module):
    """One layer. `pool` is how the rows are summed: `bag` (embedding_bag), `product` (a batched product with the scores, spread
    over blocks) or `scatter` (scatter_add). `sparse` makes the table's gradient a sparse tensor, where `pool` is `bag`."""

    def __init__(self, config: Config, pool: str = "bag", sparse: bool = False) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool {pool!r} is none of {', '.join(POOLS)}")
        self.config, self.pool_by, self.sparse = config, pool, sparse
        c, width = config, config.key_dim**-0.5
        self.query_proj = normal(c.pairs * 2 * c.key_dim, c.hidden_size, std=width)
        self.query_norm = nn.Parameter(torch.full((c.key_dim,), c.key_dim**-0.33))
        self.keys = normal(2, c.heads, c.tucker_rank, c.side_keys, c.key_dim, std=width)
        self.values = normal(c.rows, c.value_dim, std=0.02)
        self.values_proj = normal(c.hidden_size, c.expansion * c.value_dim, std=(c.expansion * c.value_dim) ** -0.5)
        if c.normalises_keys:
            self.keys_norm = nn.Parameter(torch.full((c.key_dim,), c.key_dim**-0.33))
        if c.gated:
            self.gate_proj = normal(c.value_dim, c.hidden_size, std=c.hidden_size**-0.5)
        if c.tucker:
            self.cores = nn.Parameter(torch.rand(c.cores, c.heads, c.tucker_rank, c.tucker_rank))
            self.register_buffer("core_uv", leading_vectors(self.cores.detach().sum(0)))
            self.register_buffer("shuffle_index", torch.randperm(c.slots))
        self.prepared: Tensor | None = None

    def prepare(self) -> MemoryLayer:
        """Normalises the keys once and for all, as whoever serves the layer would: weights must not change any more."""
        self.prepared = self.normalised_keys().detach()
        return self

    def forward(self, x: Tensor) -> Tensor:
        kept = self.retrieve(x)
        return self.project(x, self.expand(kept))

    def retrieve(self, x: Tensor) -> Kept:
        return self.combine(self.score(self.query(x)))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        shape, eps = (self.config.key_dim,), self.config.norm_eps
        return F.rms_norm(x, shape, weight, eps) if self.config.norm == "rms" else F.layer_norm(x, shape, weight, None, eps)

    def normalised_keys(self) -> Tensor:
        return self.norm(self.keys, self.keys_norm) if self.config.normalises_keys else self.keys

    def query(self, x: Tensor) -> Tensor:
        """`[2, pairs, tokens, key_dim]`."""
        product = F.linear(x, self.query_proj).view(-1, self.config.pairs, 2, self.config.key_dim)
        return self.norm(product, self.query_norm).permute(2, 1, 0, 3)

    def score(self, queries: Tensor) -> Tensor:
        """Every key's score vector, `[2, tokens, heads, tucker_rank, side_keys]`."""
        c = self.config
        keys = self.normalised_keys() if self.prepared is None else self.prepared
        products = queries @ keys.view(2, c.pairs, -1, c.key_dim).transpose(2, 3)
        split = products.view(2, c.pairs, -1, c.heads // c.pairs, c.tucker_rank, c.side_keys)
        return split.transpose(1, 2).flatten(2, 3)

    def combine(self, scores: Tensor) -> Kept:
        """Keeps `top_m` keys of each side, and of their pairs the `top_m` with the largest total."""
        c = self.config
        with torch.no_grad():
            kept_keys = self.approximate(scores.detach()).topk(c.top_m, dim=-1, sorted=False).indices
        kept = scores.gather(4, kept_keys[:, :, :, None].expand(-1, -1, -1, c.tucker_rank, -1))
        with torch.no_grad():
            pairs = self.totals(kept.detach()).flatten(2).topk(c.top_m, dim=-1, sorted=False).indices
            places = torch.stack([pairs // c.top_m, pairs % c.top_m])
            rows, columns = kept_keys.gather(3, places)
        sides = kept.gather(4, places[:, :, :, None].expand(-1, -1, -1, c.tucker_rank, -1))
        return Kept((rows * c.side_keys + columns).flatten(1), self.exact(*sides).flatten(1, 2))

    def approximate(self, scores: Tensor) -> Tensor:
        """What a key is kept by, `[2, tokens, heads, side_keys]`."""
        if not self.config.tucker:
            return scores[:, :, :, 0]
        return (scores * self.core_uv[:, None, :, :, None]).sum(3)

    def totals(self, kept: Tensor) -> Tensor:
        """The total of each pair of kept keys, `[tokens, heads, top_m, top_m]`."""
        rows, columns = kept
        if not self.config.tucker:
            return rows.transpose(2, 3) + columns
        return (self.cores.detach().sum(0).transpose(1, 2) @ rows).transpose(2, 3) @ columns

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The scores of the kept pairs, `[tokens, heads, top_m, cores]`."""
        if not self.config.tucker:
            return (rows + columns).softmax(3).transpose(2, 3)
        outer = (rows[:, :, :, None] * columns[:, :, None]).flatten(2, 3)
        return (self.cores.flatten(2).transpose(0, 1) @ outer).transpose(2, 3)

    def expand(self, kept: Kept) -> Tensor:
        """The sum of the kept rows of each block, slice by slice, `[tokens, expansion * value_dim]`."""
        address = self.shuffle_index[kept.slots] if self.config.tucker else kept.slots
        block = torch.div(address, self.config.rows, rounding_mode="floor")
        pool = {"bag": self.bag, "product": self.product, "scatter": self.scatter}[self.pool_by]
        return pool(address - block * self.config.rows, block, kept.scores)

    def bag(self, row: Tensor, block: Tensor, scores: Tensor) -> Tensor:
        """A bag for each token, slice and block. A token's rows are brought in order of their blocks, so that bags are ranges; the
        table is seen as one of slices."""
        c, (tokens, count) = self.config, row.shape
        order = block.argsort(1)
        row = row.gather(1, order)
        scores = scores.gather(1, order[..., None].expand(-1, -1, c.cores)).transpose(1, 2)
        slices = row[:, None] * c.cores + torch.arange(c.cores, device=row.device)[:, None]
        sizes = F.one_hot(block, c.expansion).sum(1)
        begins = torch.arange(0, tokens * c.cores * count, count, device=row.device).view(tokens, c.cores, 1)
        offsets = begins + (sizes.cumsum(1) - sizes)[:, None]
        table = self.values.view(-1, c.value_dim // c.cores)
        pooled = F.embedding_bag(slices.reshape(-1), table, offsets.view(-1), mode="sum", sparse=self.sparse,
                                 per_sample_weights=scores.reshape(-1))
        return pooled.view(tokens, c.cores, c.expansion, -1).transpose(1, 2).reshape(tokens, -1)

    def product(self, row: Tensor, block: Tensor, scores: Tensor) -> Tensor:
        """The gathered rows, multiplied by a matrix that holds each score at its block and zeros elsewhere."""
        c, tokens = self.config, row.shape[0]
        read = F.embedding(row, self.values).view(tokens, -1, c.cores, c.value_dim // c.cores)
        spread = F.one_hot(block, c.expansion).to(scores.dtype)[:, :, None] * scores[..., None]
        return torch.einsum("tnke,tnkd->tekd", spread, read).reshape(tokens, -1)

    def scatter(self, row: Tensor, block: Tensor, scores: Tensor) -> Tensor:
        """The gathered rows, each times its scores, added to its block."""
        c, tokens = self.config, row.shape[0]
        read = F.embedding(row, self.values).view(tokens, -1, c.cores, c.value_dim // c.cores) * scores[..., None]
        pooled = torch.zeros(tokens, c.expansion, c.value_dim, device=row.device, dtype=read.dtype)
        return pooled.scatter_add(1, block[..., None].expand(-1, -1, c.value_dim), read.flatten(2)).flatten(1)

    def project(self, x: Tensor, pooled: Tensor) -> Tensor:
        if self.config.gated:
            pooled = pooled * F.silu(F.linear(x, self.gate_proj))
        return F.linear(pooled, self.values_proj)
