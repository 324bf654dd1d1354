"""The four networks that the tests of what people already use run on: GPT-2, BERT, ViT, ResNet, tiny and random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=19, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


MODELS = {"gpt2": gpt2, "bert": bert, "vit": vit, "resnet": resnet}


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if name in ("gpt2", "bert"):
        ids = torch.randint(1, 19, (2, 7))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, {"pixel_values": torch.randn(2, 3, 8, 8)}


def random_scores(name: str, weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
