"""What a layer is: its kind and its dimensions, as DESIGN names them, and how a file's metadata spells them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import isqrt

KINDS = {"ultramem_v1": "UltraMem", "pkm": "ProductKey", "memory_plus": "MemoryPlus"}


@dataclass(frozen=True)
class Config:
    """A layer whose table is its own: UltraMem, product keys or Memory+."""

    kind: str = "ultramem_v1"
    hidden_size: int = 256
    side_keys: int = 128
    key_dim: int = 32
    value_dim: int = 64
    top_m: int = 16
    heads: int = 2
    cores: int = 2
    expansion: int = 4
    tucker_rank: int = 2
    norm: str = "rms"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        if not self.tucker and (self.cores, self.expansion, self.tucker_rank) != (1, 1, 1):
            raise ValueError(f"a layer of kind {self.kind} has cores, expansion and tucker_rank 1")
        if self.top_m > self.side_keys:
            raise ValueError(f"top_m {self.top_m} exceeds side_keys {self.side_keys}")
        if self.value_dim % self.cores or self.slots % self.expansion:
            raise ValueError("cores must divide value_dim, and expansion the square of side_keys")

    @property
    def tucker(self) -> bool:
        """Whether a pair's score is Tucker's; else a sum, and a softmax follows."""
        return self.kind == "ultramem_v1"

    @property
    def pairs(self) -> int:
        """Query pairs: one for all heads, or one a head."""
        return self.heads if self.kind == "memory_plus" else 1

    @property
    def normalises_keys(self) -> bool:
        """Whether keys are normalised, or taken as they are."""
        return self.kind != "memory_plus"

    @property
    def gated(self) -> bool:
        """Whether the pooled value is multiplied by silu(W_g x)."""
        return self.kind == "memory_plus"

    @property
    def slots(self) -> int:
        """Slots that a head chooses from."""
        return self.side_keys**2

    @property
    def rows(self) -> int:
        """Rows of the value table."""
        return self.slots // self.expansion

    def dimensions(self) -> dict[str, object]:
        """As `ultramem bench --json` prints them."""
        return {**asdict(self), "kind": KINDS[self.kind]}

    def metadata(self) -> dict[str, str]:
        """The entries of a file of this layer."""
        root = isqrt(self.expansion)
        if root * root != self.expansion:
            raise ValueError(f"expansion {self.expansion} is no square: a file cannot say it")
        entries: dict[str, object] = {
            "kind": self.kind, "hidden_size": self.hidden_size, "head": self.heads, "knum": self.side_keys // root,
            "kdim": self.key_dim, "knn": self.top_m, "vdim": self.value_dim, "norm": self.norm, "norm_eps": self.norm_eps,
        }
        if self.tucker:
            entries |= {"tucker_rank": self.tucker_rank, "tucker_multihead": self.cores, "value_expand_time": self.expansion}
        return {name: str(value) for name, value in entries.items()}

    @classmethod
    def from_metadata(cls, entries: dict[str, str]) -> Config:
        """The layer that a file's metadata describes."""
        expansion = int(entries.get("value_expand_time", "1"))
        return cls(
            kind=entries["kind"], hidden_size=int(entries["hidden_size"]), side_keys=int(entries["knum"]) * isqrt(expansion),
            key_dim=int(entries["kdim"]), value_dim=int(entries["vdim"]), top_m=int(entries["knn"]), heads=int(entries["head"]),
            cores=int(entries.get("tucker_multihead", "1")), expansion=expansion,
            tucker_rank=int(entries.get("tucker_rank", "1")), norm=entries["norm"], norm_eps=float(entries["norm_eps"]),
        )


PRESETS = {
    # The dimensions that nobody gave.
    "small": Config(),
    # src/config/presets.rs.
    "ultramem_v1_1b": Config(hidden_size=768, side_keys=1616, key_dim=192, value_dim=384, top_m=80),
}
