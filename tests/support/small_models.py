"""Two-layer models that are built in milliseconds and need no download."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlm3d.config import Config, config_from_dict
from vlm3d.model.language_model import LanguageModel, add_lora
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.text_encoder import TextEncoder

SMALL = {
    "name": "small-test",
    "preprocessing": {"spacing_mm": [6.0, 4.0, 4.0], "max_shape": [48, 96, 96]},
    "model": {
        "vision": {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "region_dim": 16,
            "region_every": 1,
            "position_grid": [4, 3, 3],
            "max_slice_distance": 6,
        },
        "classifier": {"shared_dim": 16, "num_soft_prompts": 2, "dropout": 0.0},
        "localizer": {
            "base_channels": 8,
            "bottleneck_channels": 16,
            "denoiser_depth": 2,
            "denoiser_heads": 2,
            "text_dim": 16,
        },
        "report": {
            "projector_dim": 32,
            "projector_depth": 1,
            "num_queries": 3,
            "lora_rank": 2,
            "lora_alpha": 4,
            "max_new_tokens": 12,
        },
    },
}


def small_config(**report: object) -> Config:
    """Settings of the two-layer model; keywords go to its report section."""
    values = {**SMALL, "model": {**SMALL["model"], "report": {**SMALL["model"]["report"], **report}}}  # type: ignore[index,dict-item]
    return config_from_dict(values, "test")


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, so any text can be written."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "[CLS]", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.decoders import ByteLevel

    backend.decoder = ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", cls_token="[CLS]"
    )


def small_language_model(*, lora: bool = True, seed: int = 0) -> LanguageModel:
    """A two-layer Llama with random weights."""
    torch.manual_seed(seed)
    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    return LanguageModel(add_lora(model, 2, 4, 0.0) if lora else model, tokenizer, "small-test-llm")


def small_text_encoder(seed: int = 0) -> TextEncoder:
    """A two-layer BERT with random weights."""
    torch.manual_seed(seed)
    tokenizer = small_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=300,
    )
    return TextEncoder(BertModel(config, add_pooling_layer=False), tokenizer, "small-test-bert")


def small_model(*, seed: int = 0, with_text: bool = True, **report: object) -> VLM3DMultiTask:
    """The whole model with two-layer language and text models."""
    torch.manual_seed(seed)
    llm = small_language_model(seed=seed)
    config = small_config(**report)
    model = VLM3DMultiTask(
        config, text_encoder=small_text_encoder(seed), load_llm=False, llm_dim=llm.hidden_size
    )
    model.report_generator.attach_llm(llm)
    if not with_text:
        model.classifier.detach_text_encoder()
    return model
