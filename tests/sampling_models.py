"""A tiny Qwen3 with random weights whose answers vary, and prompts for it."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB, MASK, EOS = 40, 39, 38


def tiny_model(attention: str = "sdpa") -> Qwen3ForCausalLM:
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.4,
        attn_implementation=attention,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.mul_(4)  # sharp attention: every position says its own
    return model


def random_prompts(lengths: list[int] | tuple[int, ...]) -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, EOS, (n,), generator=random).tolist() for n in lengths]
