"""Small random models, made on the spot: a Llama, a Gemma 2 with soft-capped logits, a GPT-2 and a ViT."""

import transformers

VOCABULARY = 97
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**changes: object) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **TOKENS, **changes))


def gemma2(**changes: object) -> transformers.Gemma2ForCausalLM:
    """With final_logit_softcapping, of 30 as in Gemma 2's own configuration, or of what is given."""
    config = transformers.Gemma2Config(**SHAPE, **TOKENS, num_key_value_heads=2, head_dim=16, **changes)
    return transformers.Gemma2ForCausalLM(config)


def gpt2(**changes: object) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, **changes
    )
    return transformers.GPT2LMHeadModel(config)


def vit(**changes: object) -> transformers.ViTForImageClassification:
    config = transformers.ViTConfig(**SHAPE, image_size=16, patch_size=8, num_labels=10, **changes)
    return transformers.ViTForImageClassification(config)


MODELS = {"llama": llama, "gemma2": gemma2, "gpt2": gpt2}
