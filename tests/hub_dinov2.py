"""A vision transformer with the interface of DINOv2's own code, ``torch.hub.load("facebookresearch/dinov2", …)``.

Same class name, attributes, methods, arguments and keys of outputs; the arithmetic is that of any pre-norm ViT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["DinoVisionTransformer"]


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).mT


class Attention(nn.Module):
    """With the explicit softmax of the first release, or PyTorch's fused attention and a number for the dropout."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop: Any = 0.0 if fused else nn.Dropout(0.0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if isinstance(self.attn_drop, float):
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = self.attn_drop((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens * self.gamma


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ffn_layer: str, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, fused)
        self.mlp = Mlp(dim, 2 * dim) if ffn_layer == "mlp" else SwiGLU(dim, 2 * dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class BlockChunk(nn.ModuleList):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for block in self:
            tokens = block(tokens)
        return tokens


class DinoVisionTransformer(nn.Module):
    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 8,
        embed_dim: int = 32,
        depth: int = 2,
        num_heads: int = 4,
        num_register_tokens: int = 0,
        ffn_layer: str = "mlp",
        block_chunks: int = 0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        self.num_tokens, self.n_blocks, self.num_heads, self.patch_size = 1, depth, num_heads, patch_size
        self.num_register_tokens = num_register_tokens
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (img_size // patch_size) ** 2 + 1, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        blocks = [Block(embed_dim, num_heads, ffn_layer, fused) for _ in range(depth)]
        self.chunked_blocks = block_chunks > 0
        self.blocks = nn.ModuleList([BlockChunk(blocks)] if self.chunked_blocks else blocks)
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side, size = int(patches.shape[1] ** 0.5), (height // self.patch_size, width // self.patch_size)
        if size == (side, side):
            return self.pos_embed
        grid = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        resized = F.interpolate(grid, size, mode="bicubic", align_corners=False)
        return torch.cat([cls, resized.flatten(2).mT], dim=1)

    def prepare_tokens_with_masks(self, x: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        tokens = self.patch_embed(x)
        if masks is not None:
            tokens = torch.where(masks.unsqueeze(-1), self.mask_token.unsqueeze(0), tokens)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = tokens + self.interpolate_pos_encoding(*x.shape[-2:])
        if self.register_tokens is not None:
            tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(len(x), -1, -1), tokens[:, 1:]], dim=1)
        return tokens

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        if isinstance(x, list):
            return [self.forward_features(image, mask) for image, mask in zip(x, masks, strict=True)]
        tokens = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            tokens = block(tokens)
        normed, start = self.norm(tokens), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:start],
            "x_norm_patchtokens": normed[:, start:],
            "x_prenorm": tokens,
            "masks": masks,
        }

    def get_intermediate_layers(
        self, x: torch.Tensor, n: Any = 1, reshape: bool = False, return_class_token: bool = False, norm: bool = True
    ) -> tuple[Any, ...]:
        tokens, outputs = self.prepare_tokens_with_masks(x), []
        taken = range(self.n_blocks - n, self.n_blocks) if isinstance(n, int) else n
        blocks = self.blocks[0] if self.chunked_blocks else self.blocks
        for index, block in enumerate(blocks):
            tokens = block(tokens)
            if index in taken:
                outputs.append(self.norm(tokens) if norm else tokens)
        patches = [output[:, 1 + self.num_register_tokens :] for output in outputs]
        if reshape:
            height, width = (side // self.patch_size for side in x.shape[-2:])
            patches = [p.reshape(len(x), height, width, -1).permute(0, 3, 1, 2).contiguous() for p in patches]
        return (
            tuple(zip(patches, [output[:, 0] for output in outputs], strict=True))
            if return_class_token
            else tuple(patches)
        )

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        features = self.forward_features(*args, **kwargs)
        return features if is_training else self.head(features["x_norm_clstoken"])
