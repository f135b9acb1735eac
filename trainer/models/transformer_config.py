"""The shape of a transformer, checked. Free of jax."""

from __future__ import annotations

import dataclasses

from launch.spec import closest, require

_DTYPES = ("bfloat16", "float16", "float32")
# Factories of policies (they take arguments) cannot be asked for by name alone.
_POLICIES = (
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
)
# Our own, of trainer/models/remat.py.
REMAT_POLICIES = ("full", "keep_attention", "keep_qkv", "keep_all_but_mlp")
_KERNELS = ("auto", "splash", "cudnn", "xla")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer, and how it is computed.

    Attributes:
      vocab_size: token ids are in [0, vocab_size).
      dim: model width.
      num_layers: blocks.
      num_heads: query heads.
      mlp_dim: width of the MLP.
      num_kv_heads: key and value heads; None for as many as query heads.
      head_dim: width of a head; None for dim / num_heads.
      rope_base: longest wavelength of the rotary embedding, in positions / 2 pi.
      norm_epsilon: added to the mean square in RMSNorm.
      tied_head: use the embedding table as the output head too.
      param_dtype: of the parameters (and so of the optimizer's moments).
      dtype: of matmuls and activations; norms, softmax and loss are computed in float32.
      scan_layers: stack the layers' parameters and scan over them: one layer is compiled instead
        of all, for about 10% of the speed on CPU.
      remat: what a layer keeps for its backward pass: `none` (remat off, all is kept), `full`
        (only its input), `keep_attention`, `keep_qkv` or `keep_all_but_mlp` (see
        trainer/models/remat.py), or a policy of `jax.checkpoint_policies` by name.
      z_loss: weight of logsumexp(logits)^2 in the loss, which keeps logits near zero.
      attention: the kernel: `splash` (TPU), `cudnn` (GPU), `xla` (plain, anywhere), or `auto`: the
        platform's own wherever it can compute these shapes.
      mlp_chunk: how much of a device's part of the MLP's width is computed at a time, to save
        memory; 0 for all. Chunks are computed again in the backward pass, whatever `remat` says.
      loss_chunk: how many entries of the vocabulary have their logits computed at a time; all, if
        there are no more. Chunks cost a second pass over the head, and save the logits' memory.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied_head: bool = True
    param_dtype: str = "float32"
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"
    z_loss: float = 0.0
    attention: str = "auto"
    mlp_chunk: int = 0
    loss_chunk: int = 4096

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "mlp_dim", "kv_heads"):
            value = getattr(self, name)
            field = "num_kv_heads" if name == "kv_heads" else name
            require(value >= 1, field, value, "must be at least 1")
        require(
            self.num_heads % self.kv_heads == 0,
            "num_kv_heads",
            self.kv_heads,
            f"must divide num_heads={self.num_heads}; use one of {_divisors(self.num_heads)}",
        )
        if self.head_dim is None:
            require(
                self.dim % self.num_heads == 0,
                "num_heads",
                self.num_heads,
                f"must divide dim={self.dim}; use one of {_divisors(self.dim)}, or set head_dim",
            )
        field = "num_heads" if self.head_dim is None else "head_dim"
        require(
            self.width_of_head >= 2 and self.width_of_head % 2 == 0,
            field,
            getattr(self, field),
            f"gives heads of width {self.width_of_head}, which must be even (rotary embedding "
            "turns pairs); change num_heads or head_dim",
        )
        for name in ("param_dtype", "dtype"):
            value = getattr(self, name)
            require(value in _DTYPES, name, value, closest(value, _DTYPES))
        known = ("none", *REMAT_POLICIES, *_POLICIES)
        require(self.remat in known, "remat", self.remat, closest(self.remat, known))
        hint = closest(self.attention, _KERNELS)
        require(self.attention in _KERNELS, "attention", self.attention, hint)
        require(self.mlp_chunk >= 0, "mlp_chunk", self.mlp_chunk, "must be 0 (all) or more")
        require(self.loss_chunk >= 1, "loss_chunk", self.loss_chunk, "must be at least 1")
        require(self.rope_base > 1, "rope_base", self.rope_base, "must be more than 1")
        require(self.norm_epsilon > 0, "norm_epsilon", self.norm_epsilon, "must be more than 0")
        require(self.z_loss >= 0, "z_loss", self.z_loss, "must be 0 (off) or more")

    @property
    def kv_heads(self) -> int:
        """Key and value heads, K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def width_of_head(self) -> int:
        """Width of a head, H."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
