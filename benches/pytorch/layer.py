"""The layer in PyTorch, stage by stage: query, score, combine, expand, project.

Weights lie as is best for PyTorch, not as files have them (files.py turns them): keys are `[2, heads, tucker_rank, side_keys,
key_dim]`, so that norms run over contiguous numbers and one batched product scores both sides; the table is one of slices, `[rows *
cores, value_dim / cores]`, because each has a score of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config

FEW_TOKENS = 8
"""Up to as many, a served layer scores by projected keys."""
POOLS = ("bag", "product", "scatter")


class Sides(NamedTuple):
    """The keys that each side keeps, `[2, tokens, heads, top_m]`, and their score vectors, `[2, tokens, heads, tucker_rank, top_m]`."""

    keys: Tensor
    scores: Tensor


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
        self.values = normal(c.rows * c.cores, c.value_dim // c.cores, std=0.02)
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
        self.projected: Tensor | None = None
        self.few_tokens = FEW_TOKENS

    def prepare(self) -> MemoryLayer:
        """Normalises and projects the keys once and for all, as whoever serves the layer would: weights must not change any more."""
        c = self.config
        with torch.no_grad():
            self.prepared = self.normalised_keys().detach().contiguous()
            self.projected = (self.prepared * self.core_uv[..., None, None]).sum(2) if c.tucker else self.prepared[:, :, 0]
        ranks = torch.arange(2 * c.heads * c.tucker_rank, device=self.keys.device)
        self.first_keys = ranks.view(2, 1, c.heads, c.tucker_rank, 1) * c.side_keys
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

    def score(self, queries: Tensor) -> Sides:
        """Keeps the `top_m` keys of each side by their approximate scores."""
        few = queries.shape[2] <= self.few_tokens
        return self.score_projected(queries) if few and self.projected is not None else self.score_whole(queries)

    def score_whole(self, queries: Tensor) -> Sides:
        """By every key's score vector, of one batched product."""
        c = self.config
        keys = self.normalised_keys() if self.prepared is None else self.prepared
        products = queries @ keys.view(2, c.pairs, -1, c.key_dim).transpose(2, 3)
        split = products.view(2, c.pairs, -1, c.heads // c.pairs, c.tucker_rank, c.side_keys)
        scores = split.transpose(1, 2).flatten(2, 3)
        with torch.no_grad():
            kept = self.approximate(scores.detach()).topk(c.top_m, dim=-1, sorted=False).indices
        return Sides(kept, scores.gather(4, kept[:, :, :, None].expand(-1, -1, -1, c.tucker_rank, -1)))

    def score_projected(self, queries: Tensor) -> Sides:
        """By the product with projected keys; then only kept keys are read whole. For a few tokens, which read keys no faster than memory."""
        c, tokens = self.config, queries.shape[2]
        products = queries @ self.projected.view(2, c.pairs, -1, c.key_dim).transpose(2, 3)
        approximate = products.view(2, c.pairs, tokens, -1, c.side_keys).transpose(1, 2).flatten(2, 3)
        kept = approximate.topk(c.top_m, dim=-1, sorted=False).indices
        places = kept[:, :, :, None] + self.first_keys
        read = F.embedding(places.view(2, tokens, c.pairs, -1), self.prepared.view(-1, c.key_dim))
        return Sides(kept, (read @ queries.transpose(1, 2)[..., None]).view(2, tokens, c.heads, c.tucker_rank, c.top_m))

    def approximate(self, scores: Tensor) -> Tensor:
        """What a key is kept by, `[2, tokens, heads, side_keys]`."""
        if not self.config.tucker:
            return scores[:, :, :, 0]
        weights = self.core_uv[:, None, :, :, None].unbind(3)
        total = scores[:, :, :, 0] * weights[0]
        for rank in range(1, self.config.tucker_rank):
            total = torch.addcmul(total, scores[:, :, :, rank], weights[rank])
        return total

    def combine(self, sides: Sides) -> Kept:
        """Of the pairs of kept keys keeps the `top_m` with the largest total."""
        c = self.config
        with torch.no_grad():
            pairs = self.totals(sides.scores.detach()).flatten(2).topk(c.top_m, dim=-1, sorted=False).indices
            places = torch.stack([pairs // c.top_m, pairs % c.top_m])
            rows, columns = sides.keys.gather(3, places)
        scores = sides.scores.gather(4, places[:, :, :, None].expand(-1, -1, -1, c.tucker_rank, -1))
        return Kept((rows * c.side_keys + columns).flatten(1), self.exact(*scores).flatten(1, 2))

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
        """A bag for each token, slice and block. A token's rows are brought in order of their blocks, so that bags are
        ranges."""
        c, (tokens, count) = self.config, row.shape
        order = block.argsort(1)
        row = row.gather(1, order)
        scores = scores.gather(1, order[..., None].expand(-1, -1, c.cores)).transpose(1, 2)
        slices = row[:, None] * c.cores + torch.arange(c.cores, device=row.device)[:, None]
        sizes = F.one_hot(block, c.expansion).sum(1)
        begins = torch.arange(0, tokens * c.cores * count, count, device=row.device).view(tokens, c.cores, 1)
        offsets = begins + (sizes.cumsum(1) - sizes)[:, None]
        pooled = F.embedding_bag(slices.reshape(-1), self.values, offsets.view(-1), mode="sum", sparse=self.sparse,
                                 per_sample_weights=scores.reshape(-1))
        return pooled.view(tokens, c.cores, c.expansion, -1).transpose(1, 2).reshape(tokens, -1)

    def gathered(self, row: Tensor) -> Tensor:
        """`[tokens, heads * top_m, cores, value_dim / cores]`."""
        return F.embedding(row, self.values.view(self.config.rows, -1)).unflatten(2, (self.config.cores, -1))

    def product(self, row: Tensor, block: Tensor, scores: Tensor) -> Tensor:
        """The gathered rows, multiplied by a matrix that holds each score at its block and zeros elsewhere."""
        c, tokens = self.config, row.shape[0]
        read = self.gathered(row)
        spread = F.one_hot(block, c.expansion).to(scores.dtype)[:, :, None] * scores[..., None]
        return torch.einsum("tnke,tnkd->tekd", spread, read).reshape(tokens, -1)

    def scatter(self, row: Tensor, block: Tensor, scores: Tensor) -> Tensor:
        """The gathered rows, each times its scores, added to its block."""
        c, tokens = self.config, row.shape[0]
        read = self.gathered(row) * scores[..., None]
        pooled = torch.zeros(tokens, c.expansion, c.value_dim, device=row.device, dtype=read.dtype)
        return pooled.scatter_add(1, block[..., None].expand(-1, -1, c.value_dim), read.flatten(2)).flatten(1)

    def project(self, x: Tensor, pooled: Tensor) -> Tensor:
        if self.config.gated:
            pooled = pooled * F.silu(F.linear(x, self.gate_proj))
        return F.linear(pooled, self.values_proj)
