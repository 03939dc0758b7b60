"""A small BERT: an encoder that fills in masked tokens, looking in both directions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention in which every token sees every token that is not padding."""

    def __init__(self, d_model: int, nhead: int, dropout: float) -> None:
        super().__init__()
        self.nhead = nhead
        self.dropout = dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map (batch, length, d_model) to the same shape; `bias` is added to the scores, (batch, 1, 1, length)."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.nhead, width // self.nhead).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention, then a feed-forward network; each normalises its input and adds to the residual stream."""

    def __init__(self, d_model: int, nhead: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attn = Attention(d_model, nhead, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map (batch, length, d_model) to the same shape."""
        x = x + self.drop(self.attn(self.norm1(x), bias))
        return x + self.drop(self.mlp(self.norm2(x)))


class BERT(nn.Module):
    """Transformer encoder with a masked-language-model head."""

    def __init__(
        self,
        vocab_size: int = 2048,
        max_seq_len: int = 128,
        d_model: int = 128,
        nhead: int = 4,
        num_layers: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.position = nn.Embedding(max_seq_len, d_model)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, nhead, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size)
        self.apply(self._init_weights)
        self.head.weight = self.embed.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Predict the token that belongs at every position.

        Args:
            input_ids: Token ids, (batch, length), at most max_seq_len long.
            attention_mask: 1 for tokens and 0 for padding, (batch, length); all tokens when left out.

        Returns:
            Logits, (batch, length, vocab_size).
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.drop(self.embed(input_ids) + self.position(positions))
        bias = None
        if attention_mask is not None:
            # A large negative number instead of minus infinity: a row of nothing but padding stays finite.
            padding = 1.0 - attention_mask[:, None, None, :].to(x.dtype)
            bias = padding * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x))
