"""The language model: sizes without weights, adapters, chat formats, and what is said when loading fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from support.small_models import small_config, small_language_model, small_tokenizer
from vlm3d import extras
from vlm3d.errors import CheckpointError, ConfigError, MissingExtraError, WeightsUnavailableError
from vlm3d.model.chat import chat_around_image, end_of_turn_id
from vlm3d.model.language_model import (
    LORA_TARGETS,
    LanguageModel,
    add_lora,
    load_language_model,
    meta_language_model,
)
from vlm3d.model.llm_architectures import architecture, hidden_size, weight_bytes
from vlm3d.model.report_generator import ReportGenerator

GEMMA_STYLE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<s>' + m['role'] + '\n' + m['content'] | trim + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>model\n' }}{% endif %}"
)
DEFAULT_SYSTEM_STYLE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<s>system\nI am a bot</s>' }}{% endif %}"
    "{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("name", "parameters", "adapters"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 19_537_920),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 167_772_160),
        ("google/gemma-2-27b-it", 27_227_128_320, 456_720_384),
    ],
)
def test_sizes_are_the_published_ones(name: str, parameters: int, adapters: int) -> None:
    llm = meta_language_model(name, lora_rank=64)
    assert all(parameter.device.type == "meta" for parameter in llm.parameters())
    trained = sum(parameter.numel() for parameter in llm.adapter_parameters().values())
    assert trained == adapters
    assert sum(parameter.numel() for parameter in llm.parameters()) - trained == parameters
    assert [name for name, p in llm.named_parameters() if p.requires_grad and "lora_" not in name] == []
    assert hidden_size(name) == llm.hidden_size


def test_the_largest_model_has_seventy_billion_parameters() -> None:
    config = architecture("meta-llama/Llama-3.1-70B-Instruct")
    heads = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    attention = 2 * config.hidden_size**2 + 2 * config.hidden_size * heads
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    embeddings = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    assert config.num_hidden_layers * layer + embeddings == 70_553_706_496


def test_memory_in_four_bit_counts_linear_layers_only() -> None:
    llm = small_language_model()
    frozen = {name: p for name, p in llm.model.named_parameters() if "lora_" not in name}
    linear = sum(p.numel() for name, p in frozen.items() if "_proj" in name)
    rest = sum(p.numel() for p in frozen.values()) - linear
    expected = linear * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * rest
    assert weight_bytes(llm.model, load_in_4bit=True) == pytest.approx(expected, abs=1)
    assert weight_bytes(llm.model, load_in_4bit=False) == 2 * (linear + rest)


def test_every_projection_gets_an_adapter_and_every_adapter_a_gradient() -> None:
    llm = small_language_model()
    names = {
        f"layers.{layer}.{part}.{target}.{factor}"
        for layer in range(2)
        for target in LORA_TARGETS
        for part in ["self_attn" if target in LORA_TARGETS[:4] else "mlp"]
        for factor in ("lora_A", "lora_B")
    }
    assert set(llm.adapter_parameters()) == names
    for parameter in llm.adapter_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    llm(torch.randn(2, 6, 32)).logits.square().sum().backward()
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_adapters_travel_and_faults_are_named() -> None:
    one, two = small_language_model(), small_language_model()
    for parameter in one.adapter_parameters().values():
        torch.nn.init.normal_(parameter)
    state = one.adapter_state_dict()
    two.load_adapter_state_dict(state)
    x = torch.randn(1, 5, 32)
    assert torch.equal(one(x).logits, two(x).logits)
    first = next(iter(state))
    with pytest.raises(CheckpointError, match=first.replace(".", r"\.")):
        two.load_adapter_state_dict({name: value for name, value in state.items() if name != first})
    with pytest.raises(CheckpointError, match="stranger"):
        two.load_adapter_state_dict({**state, "stranger": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="shape"):
        two.load_adapter_state_dict({**state, first: torch.zeros(1)})
    one.set_adapters_trainable(False)
    assert not any(parameter.requires_grad for parameter in one.parameters())


def test_foreign_architectures_are_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*q_proj"):
        add_lora(model, 2, 4, 0.0)


def test_gemma_trains_and_writes_with_prompts_of_any_length() -> None:
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = GEMMA_STYLE
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4096,
    )
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    llm = LanguageModel(add_lora(model, 2, 4, 0.0), tokenizer, "small-gemma")
    assert torch.allclose(llm.embed_ids([5]), model.get_input_embeddings().weight[5] * 32**0.5)
    generator = ReportGenerator(llm, 32, small_config().model.report).eval()
    tokens, mask = generator.tokenize_reports(["Findings: A.", "Findings: A much longer one."])
    image = (torch.randn(2, 32), torch.randn(2, 20, 32), torch.randn(2, 8, 32))
    both = generator(*image, tokens, mask, prompt_texts=["a", "a much longer list of findings"])
    alone = generator(*(part[:1] for part in image), tokens[:1, : mask[0].sum()], prompt_texts=["a"])
    assert torch.allclose(alone["logits"][0], both["logits"][0, : mask[0].sum()], atol=1e-4)
    assert both["logits"].abs().max() <= 30  # Gemma caps its logits
    both["loss"].backward()
    assert generator.projector.queries.grad.abs().sum() > 0
    assert generator.generate(*image)[1].text.startswith("Findings:\n")


def test_each_family_is_addressed_in_its_own_format() -> None:
    tokenizer = small_tokenizer()

    def worded() -> list[str]:
        parts = chat_around_image(tokenizer, "Be brief.", "Scan: ", "\nGo.")
        return [tokenizer.decode(part) for part in parts]

    assert worded() == ["<s>Be brief.\n\nScan: ", "\nGo.\n\n"]
    tokenizer.chat_template = DEFAULT_SYSTEM_STYLE
    assert worded() == ["<s>system\nBe brief.</s><s>user\nScan: ", "\nGo.</s><s>assistant\n"]
    tokenizer.chat_template = GEMMA_STYLE
    assert worded() == ["<s><s>user\nBe brief.\n\nScan: ", "\nGo.</s>\n<s>model\n"]
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id


def test_the_turn_may_end_with_another_token_than_the_text() -> None:
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = GEMMA_STYLE.replace("</s>", "<end_of_turn>")
    model = small_language_model(lora=False).model
    llm = LanguageModel(model, tokenizer, "two-ends")
    assert tokenizer.decode([llm.end_token_id]) == "<end_of_turn>"
    assert llm.stop_token_ids == {llm.end_token_id, tokenizer.eos_token_id}
    assert llm.stop_token_ids <= llm.control_token_ids


def test_a_saved_folder_loads_by_its_path(tmp_path: Path) -> None:
    original = small_language_model(lora=False)
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path), lora_rank=2, dtype=torch.float32)
    x = torch.randn(1, 4, 32)
    assert torch.allclose(original(x).logits, loaded(x).logits, atol=1e-5)
    assert hidden_size(str(tmp_path)) == 32
    half = load_language_model(str(tmp_path), use_lora=False, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsUnavailableError) as raised:
        load_language_model(str(tmp_path))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_four_bit_without_its_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(extras.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"pip install 'vlm3d\[quant\]'"):
        load_language_model("HuggingFaceTB/SmolLM2-135M-Instruct", load_in_4bit=True)


def test_the_embedded_tokenizer_came_out_of_the_gguf_whole() -> None:
    llm = load_language_model("HuggingFaceTB/SmolLM2-135M-Instruct", use_lora=False)
    tokenizer = llm.tokenizer
    assert tokenizer.convert_ids_to_tokens(llm.end_token_id) == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>"
    head, tail = llm.chat_around_image("Be brief.", "Scan: ", "\nGo.")
    assert tokenizer.decode(head) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nScan: "
    assert tokenizer.decode(tail) == "\nGo.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.tokenize("a  12 mm") == ["a", "ĠĠ", "1", "2", "Ġmm"]
    text = "Findings:\nA 12 mm nodule (0.9 ml), it's new.\n\nImpression:\n≥ 3 × 4 cm."
    assert llm.decode(llm.encode(text)) == text
    assert sum(parameter.numel() for parameter in llm.parameters()) == 134_515_008
    assert 0.05 < llm.embedding_rms() < 0.5


def test_a_four_bit_model_still_learns_after_it_was_judged(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embedded = torch.randn(1, 5, 64)

    def gradient(llm: LanguageModel) -> torch.Tensor:
        given = embedded.clone().requires_grad_()
        llm.train()(given).logits.square().sum().backward()
        assert given.grad is not None
        return given.grad

    def judge(llm: LanguageModel) -> None:
        with torch.no_grad():
            llm.eval()(embedded)

    llm = load_language_model(str(tmp_path), load_in_4bit=True, use_lora=False, dtype=torch.float32)
    before = gradient(llm)
    judge(llm)
    torch.testing.assert_close(gradient(llm), before)
    packs = [m for m in llm.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for linear in packs:
        linear.support_avx512bf16_for_cpu = True  # as on a processor that has it
    llm.train()
    assert [linear.support_avx512bf16_for_cpu for linear in packs] == [False] * 7
    fresh = load_language_model(str(tmp_path), load_in_4bit=True, use_lora=False, dtype=torch.float32)
    judge(fresh)
    if torch.cpu.get_capabilities().get(
        "avx512_bf16"
    ):  # there bitsandbytes packs weights at the first inference
        with pytest.raises(RuntimeError, match="load it anew"):
            fresh.train()
