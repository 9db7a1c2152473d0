"""Multi-head attention made of two linear layers, so that either can be another kind of layer."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """What `torch.nn.MultiheadAttention` computes, by the layers `in_proj` and `out_proj`.

    PyTorch's module takes its weights past its layers' forward, so that they cannot be replaced by
    BatchEnsemble layers [Vaswani et al. 2017, §3.2.2].

    Args:
        module: with `batch_first`, with queries, keys and values of one width, and without
            `add_bias_kv` and `add_zero_attn`. Its parameters become those of the two layers.

    Raises:
        ValueError: it is another one.
    """

    # What PyTorch's transformer layers ask before they would take weights past forward: the answers
    # of a module for which that cannot be.
    in_proj_bias = None
    _qkv_same_embed_dim = False
    batch_first = True

    def __init__(self, module: nn.MultiheadAttention):
        super().__init__()
        if not module.batch_first:
            raise ValueError("its rows are in the second dimension (batch_first=False)")
        if not module._qkv_same_embed_dim:
            raise ValueError("its queries, keys and values differ in width")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("it has add_bias_kv or add_zero_attn")
        self.embed_dim, self.num_heads = module.embed_dim, module.num_heads
        self.dropout = module.dropout
        with torch.device("meta"):
            self.in_proj = nn.Linear(self.embed_dim, 3 * self.embed_dim)
            self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.in_proj.weight, self.in_proj.bias = module.in_proj_weight, module.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = module.out_proj.weight, module.out_proj.bias
        self.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of `torch.nn.MultiheadAttention`: (rows, L, E), (rows, S, E) → (rows, L, E).

        `is_causal` is a hint that comes with a mask, which says the same.
        """
        inputs = (query, key, value)
        distinct = {id(it): it for it in inputs}  # often all three are one
        projected = {key: self.in_proj(it) for key, it in distinct.items()}
        q, k, v = (
            projected[id(it)]
            .chunk(3, -1)[place]
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)
            for place, it in enumerate(inputs)
        )
        mask = self._mask(q, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, dropout) @ v
        else:
            weights = None
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights

    def _mask(
        self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """What is added to the scores (rows, heads, L, S), if anything; True stands for −∞."""
        added = []
        if attn_mask is not None:
            of_heads = attn_mask.ndim == 3  # (rows·heads, L, S)
            added.append(attn_mask.unflatten(0, q.shape[:2]) if of_heads else attn_mask)
        if key_padding_mask is not None:
            added.append(key_padding_mask[:, None, None, :])
        as_numbers = [
            torch.zeros_like(it, dtype=q.dtype).masked_fill(it, -torch.inf)
            if it.dtype == torch.bool
            else it.to(q.dtype)
            for it in added
        ]
        return sum(as_numbers[1:], as_numbers[0]) if as_numbers else None
