"""The public model: the user's three usage examples, traps of the published reference, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm3d
from support.small_models import small_config, small_language_model, small_model, small_text_encoder
from vlm3d import MultiTaskLoss, VLM3DMultiTask, load_config
from vlm3d.anatomy.regions import REGION_IDS, REGIONS
from vlm3d.config import Config
from vlm3d.errors import CheckpointError, OutputError
from vlm3d.labels import LESION_KEYS, STORED_LESION_KEYS
from vlm3d.model.evaluation_mode import evaluating
from vlm3d.model.heads import read_heads

SHAPE = (8, 32, 32)


def make_batch(model: VLM3DMultiTask, size: int = 2) -> dict:
    torch.manual_seed(3)
    reports = ["Findings: A nodule.\n\nImpression: Nodule.\n\nRecommendations: CT.", "Findings: Clear."][
        :size
    ]
    tokens, mask = model.report_generator.tokenize_reports(reports)
    return {
        "ct_volume": torch.randn(size, 1, *SHAPE),
        "segmentation_mask": torch.randint(0, 21, (size, *SHAPE)),
        "disease_labels": torch.randint(0, 2, (size, 18)).float(),
        "lesion_masks": {key: torch.randint(0, 2, (size, *SHAPE)) for key in LESION_KEYS},
        "report_tokens": tokens,
        "report_attention_mask": mask,
    }


def run(model: VLM3DMultiTask, batch: dict) -> dict:
    return model(
        ct_volume=batch["ct_volume"],
        segmentation_mask=batch["segmentation_mask"],
        disease_labels=batch["disease_labels"],
        lesion_masks_gt=batch["lesion_masks"],
        report_tokens=batch["report_tokens"],
        report_attention_mask=batch["report_attention_mask"],
    )


# --- the three usage examples --------------------------------------------------------------------------------------


def test_creating_the_full_size_model_counts_as_planned() -> None:
    """The first example, on the meta device: no storage, so a 70B model can be built anywhere."""
    model = VLM3DMultiTask(
        vision_in_channels=1,
        vision_embed_dim=768,
        vision_depth=12,
        num_diseases=18,
        num_lesion_diseases=5,
        llm_name="meta-llama/Llama-3.1-70B-Instruct",
        use_lora=True,
        lora_rank=64,
        load_in_4bit=True,
        device="meta",
    )
    sizes = {row.name: row for row in model.count_parameters()}
    assert abs(sizes["3D vision encoder"].parameters / 88e6 - 1) < 0.03
    assert sizes["classifier"].trainable <= 1.2e6
    localizer = sum(row.parameters for name, row in sizes.items() if name.startswith("localizer"))
    assert abs(localizer / 45e6 - 1) < 0.10
    assert sizes["language model (frozen)"].parameters > 69e9
    assert sizes["LoRA adapters"].trainable == sizes["LoRA adapters"].parameters > 0
    assert model.get_trainable_parameters() > 0


def test_one_width_and_depth_build_a_model_for_any_size() -> None:
    config = small_config()
    model = VLM3DMultiTask(
        config,
        vision_embed_dim=48,
        vision_depth=1,
        text_encoder=small_text_encoder(),
        load_llm=False,
        llm_dim=32,
    )
    assert model.config.model.vision.embed_dim == 48
    assert len(model.vision_encoder.blocks) == 1


def test_the_training_example() -> None:
    model = small_model().train()
    batch = make_batch(model)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    loss_fn = MultiTaskLoss(weight_classification=1.0, weight_localization=2.0, weight_generation=1.5)
    values = []
    for _ in range(4):
        losses = loss_fn(run(model, batch), batch)
        total_loss = losses["total"]
        expected = losses["classification"] + 2 * losses["localization"] + 1.5 * losses["generation"]
        assert torch.allclose(total_loss, expected)
        total_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(total_loss.item())
    assert values[-1] < values[0]


def test_the_prediction_example() -> None:
    model = small_model()
    batch = make_batch(model)
    predictions = model.predict(
        ct_volume=batch["ct_volume"],
        segmentation_mask=batch["segmentation_mask"],
        classification_threshold=0.5,
        localization_threshold=0.5,
        generate_report=True,
        report_generation_config={"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9},
    )
    assert len(predictions["classification"]["disease_names"]) == 2
    assert list(predictions["localization"]["masks"].keys()) == list(LESION_KEYS)
    assert predictions["localization"]["masks"]["lung_nodule"].shape == (2, *SHAPE)
    assert predictions["reports"][0].startswith("Findings:")
    assert "Impression:" in predictions["reports"][0]


def test_the_tiny_size_trains_and_predicts() -> None:
    """The examples again at the size that a laptop runs, with the embedded text and language models."""
    torch.manual_seed(0)
    model = VLM3DMultiTask(load_config("tiny")).train()
    batch = make_batch(model, size=1)
    losses = MultiTaskLoss()(run(model, batch), batch)
    losses["total"].backward()
    assert {"classification", "localization", "generation", "total"} <= losses.keys()
    assert losses["total"].isfinite()
    assert all(p.grad is not None for p in model.part_parameters("vision"))
    predictions = model.predict(
        batch["ct_volume"],
        batch["segmentation_mask"],
        report_generation_config={"max_new_tokens": 6, "temperature": 0.7},
    )
    assert list(predictions["localization"]["masks"]) == list(STORED_LESION_KEYS)
    assert predictions["reports"][0].startswith("Findings:")


def test_all_18_diseases_can_be_localized() -> None:
    """Prompts past the five lesions are the diseases themselves, under one name in masks, losses and words."""
    config = small_config().model
    config = config.model_copy(
        update={"localizer": config.localizer.model_copy(update={"num_lesion_diseases": 18})}
    )
    model = VLM3DMultiTask(config, text_encoder=small_text_encoder(), load_llm=False, llm_dim=32)
    masks = model.predict(torch.randn(1, 1, *SHAPE), generate_report=False)["localization"]["masks"]
    assert len(masks) == 18
    assert "atelectasis" in masks
    outputs = model.eval()(torch.randn(1, 1, *SHAPE), tasks=["localization"])
    batch = {"lesion_masks": {"atelectasis": torch.ones(1, *SHAPE)}}
    assert MultiTaskLoss()(outputs, batch)["localization"] > 0
    assert [lesion.key for lesion in model.report_generator.location.lesions] == list(masks)


@pytest.mark.parametrize("mask", [True, False])
def test_predicting_needs_no_mask_and_no_report(mask: bool) -> None:
    model = small_model()
    regions = torch.randint(0, 21, (1, *SHAPE)) if mask else None
    predictions = model.predict(torch.randn(1, 1, *SHAPE), regions, generate_report=False)
    assert predictions["reports"] == []


# --- traps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["text", "embedding", "both"])
def test_every_trainable_parameter_gets_a_gradient(strategy: str) -> None:
    model = small_model(location_strategy=strategy).train()
    batch = make_batch(model)
    batch["lesion_masks"]["pericardial_effusion"].zero_()  # so that the 'absent' token is used too
    # LoRA's second factor starts at zero, which hides the first one's gradient on the first step.
    for name, parameter in model.report_generator.llm.adapter_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    MultiTaskLoss()(run(model, batch), batch)["total"].backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    # bias entries of distances that this grid does not have are part of tables that do get a gradient
    assert without == []


def test_frozen_models_stay_frozen() -> None:
    model = small_model().train()
    batch = make_batch(model)
    MultiTaskLoss()(run(model, batch), batch)["total"].backward()
    assert all(p.grad is None for p in model.classifier.text_encoder.parameters())
    adapters = {id(p) for p in model.report_generator.llm.adapter_parameters().values()}
    assert all(p.grad is None for p in model.report_generator.llm.parameters() if id(p) not in adapters)


def test_probabilities_are_thresholded_not_logits() -> None:
    model = small_model()
    predictions = model.predict(
        torch.randn(1, 1, *SHAPE), generate_report=False, classification_threshold=0.3
    )
    probabilities = predictions["classification"]["probabilities"]
    assert torch.all((probabilities >= 0) & (probabilities <= 1))
    assert torch.equal(predictions["classification"]["predictions"], probabilities >= 0.3)
    for key, mask in predictions["localization"]["masks"].items():
        assert torch.equal(mask, predictions["localization"]["probabilities"][key] >= 0.5)


def test_every_output_depends_on_the_image() -> None:
    model = small_model().eval()
    regions = torch.randint(0, 21, (1, *SHAPE))
    tokens, mask = model.report_generator.tokenize_reports(["Findings: x."])
    outputs = [
        model(torch.randn(1, 1, *SHAPE), regions, report_tokens=tokens, report_attention_mask=mask)
        for _ in range(2)
    ]
    for pick in (
        lambda o: o["classification"]["logits"],
        lambda o: o["localization"]["mask_logits"],
        lambda o: o["generation"]["logits"],
    ):
        assert not torch.allclose(pick(outputs[0]), pick(outputs[1]), atol=1e-5)


def test_a_batch_gives_what_its_scans_give_alone() -> None:
    model = small_model().eval()
    volume, regions = torch.randn(2, 1, *SHAPE), torch.randint(0, 21, (2, *SHAPE))
    together = model(volume, regions)
    alone = [model(volume[i : i + 1], regions[i : i + 1]) for i in range(2)]
    for i in range(2):
        assert torch.allclose(
            together["localization"]["mask_logits"][i], alone[i]["localization"]["mask_logits"][0], atol=1e-4
        )
        assert torch.allclose(
            together["classification"]["logits"][i], alone[i]["classification"]["logits"][0], atol=1e-4
        )


def test_masks_that_are_read_mirrored_too_know_no_side() -> None:
    """A scan and its mirror image get masks that are mirror images; the regions change sides with them."""
    model = small_model()
    one_way, sizes = model.config, model.config.model
    localizer = sizes.localizer.model_copy(update={"read_mirrored": True})
    both_ways = one_way.model_copy(update={"model": sizes.model_copy(update={"localizer": localizer})})
    torch.manual_seed(5)
    scan, regions = torch.randn(1, 1, *SHAPE), torch.randint(0, 21, (1, *SHAPE))
    regions[regions == REGION_IDS["right_middle_lobe"]] = 0  # it has no counterpart
    swapped = regions.clone()
    for region in REGIONS:
        if region.mirror:
            swapped[regions == region.id] = REGION_IDS[region.mirror]

    def read(config: Config, image: torch.Tensor, anatomy: torch.Tensor | None) -> torch.Tensor:
        model.config = config
        with evaluating(model), torch.inference_mode():
            return model.read_masks(image, anatomy, model.encode(image, anatomy))

    for anatomy, mirrored in ((regions, swapped.flip(-1)), (None, None)):
        here, there = read(both_ways, scan, anatomy), read(both_ways, scan.flip(-1), mirrored)
        torch.testing.assert_close(here, there.flip(-1), atol=1e-5, rtol=1e-5)
        mean = (read(one_way, scan, anatomy) + read(one_way, scan.flip(-1), mirrored).flip(-1)) / 2
        torch.testing.assert_close(here, mean, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(here, read(one_way, scan, anatomy), atol=1e-3)
        model.config = both_ways
        logits_LDHW = read_heads(model, scan, anatomy).mask_logits_LDHW
        torch.testing.assert_close(logits_LDHW, here[0])
        found = model.predict(scan, anatomy, generate_report=False)["localization"]["probabilities"]
        drawn = torch.stack([found[lesion.key][0] for lesion in model.lesions])
        torch.testing.assert_close(drawn, here[0].sigmoid())


def test_tasks_can_be_left_out() -> None:
    model = small_model().eval()
    outputs = model(torch.randn(1, 1, *SHAPE), tasks=["classification"])
    assert "localization" not in outputs
    with pytest.raises(ValueError, match="classification"):
        model(torch.randn(1, 1, *SHAPE), tasks=["detection"])


def test_parts_freeze_and_unfreeze() -> None:
    model = small_model()
    everything = model.get_trainable_parameters()
    model.freeze()
    assert model.get_trainable_parameters() == 0
    model.unfreeze("projector")
    assert model.get_trainable_parameters() == sum(p.numel() for p in model.part_parameters("projector"))
    model.unfreeze()
    assert model.get_trainable_parameters() == everything
    model.unfreeze_last_blocks(1)
    assert not any(p.requires_grad for p in model.vision_encoder.blocks[0].parameters())
    assert all(p.requires_grad for p in model.vision_encoder.blocks[1].parameters())
    with pytest.raises(ValueError, match="adapters"):
        model.freeze("decoder")


def test_soft_prompts_train_through_the_text_encoder_and_stay_after_it_is_gone() -> None:
    model = small_model().train()
    before = model.classifier.prompt_embedding.clone()
    torch.nn.init.normal_(model.classifier.soft_prompts)
    model.eval()
    assert not torch.allclose(before, model.classifier.prompt_embedding)
    trained = model(torch.zeros(1, 1, *SHAPE))["classification"]["logits"]
    model.classifier.detach_text_encoder()
    assert torch.equal(trained, model(torch.zeros(1, 1, *SHAPE))["classification"]["logits"])
    assert not model.classifier.soft_prompts.requires_grad


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[VLM3DMultiTask, Path]:
    model = small_model(seed=5).eval()
    for parameter in model.report_generator.llm.adapter_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "checkpoint")
    return model, tmp_path / "checkpoint"


def reload(folder: Path) -> VLM3DMultiTask:
    return VLM3DMultiTask.from_pretrained(folder)


def test_a_checkpoint_alone_is_enough_to_predict(saved: tuple[VLM3DMultiTask, Path]) -> None:
    model, folder = saved
    loaded = reload(folder)
    loaded.report_generator.attach_llm(small_language_model(seed=5))
    volume, regions = torch.randn(1, 1, *SHAPE), torch.randint(0, 21, (1, *SHAPE))
    expected, found = model.predict(volume, regions), loaded.predict(volume, regions)
    assert torch.equal(expected["classification"]["probabilities"], found["classification"]["probabilities"])
    assert expected["reports"] == found["reports"]
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.training_status == "untrained"
    assert loaded.classifier.text_encoder is None


def test_embeddings_of_a_checkpoint_stay_to_the_bit_until_the_soft_prompts_change() -> None:
    """Another processor rounds them otherwise; thresholds that were tuned for these weights must know them again."""
    state = small_model().checkpoint_state_dict()
    elsewhere = torch.nextafter(state["classifier.prompt_embedding"], torch.tensor(9.0))
    model = small_model(seed=1)
    model.load_checkpoint_state_dict({**state, "classifier.prompt_embedding": elsewhere})
    model.train().eval()
    assert torch.equal(model.checkpoint_state_dict()["classifier.prompt_embedding"], elsewhere)
    torch.nn.init.normal_(model.classifier.soft_prompts)
    changed = model.checkpoint_state_dict()["classifier.prompt_embedding"]
    assert not torch.allclose(changed, elsewhere, atol=1e-3)


def test_frozen_weights_are_not_in_the_checkpoint(saved: tuple[VLM3DMultiTask, Path]) -> None:
    names = load_file(saved[1] / "model.safetensors")
    assert not [
        name for name in names if "embed_tokens" in name or "text_encoder" in name or "base_layer" in name
    ]
    assert any("lora_A" in name for name in names)


def test_all_files_of_a_checkpoint_may_be_read_by_others(saved: tuple[VLM3DMultiTask, Path]) -> None:
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in saved[1].iterdir())


@pytest.mark.parametrize(
    "name", ["vision_encoder.global_token", "classifier.bias", "report_generator.projector.queries"]
)
def test_a_missing_tensor_is_named(saved: tuple[VLM3DMultiTask, Path], name: str) -> None:
    state = load_file(saved[1] / "model.safetensors")
    del state[name]
    save_file(state, saved[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match=name.rpartition(".")[2]):
        reload(saved[1])


def test_a_foreign_tensor_and_a_wrong_shape_are_named(saved: tuple[VLM3DMultiTask, Path]) -> None:
    state = load_file(saved[1] / "model.safetensors")
    save_file({**state, "vision_encoder.extra": torch.zeros(1)}, saved[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match="extra"):
        reload(saved[1])
    save_file({**state, "classifier.bias": torch.zeros(17)}, saved[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"classifier\.bias"):
        reload(saved[1])
    save_file({**state, "classifier.bias": torch.full((18,), torch.nan)}, saved[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        reload(saved[1])


@pytest.mark.parametrize("key", ["anatomy", "untrained_tasks"])
@pytest.mark.parametrize("words", [5, "phantom", ["<b>now</b>"], [None], {"phantom": 3}])
def test_what_a_checkpoint_says_of_its_training_is_a_list_of_words(
    saved: tuple[VLM3DMultiTask, Path], key: str, words: object
) -> None:
    note = json.loads((saved[1] / "training.json").read_text())
    (saved[1] / "training.json").write_text(json.dumps({**note, key: words}))
    with pytest.raises(CheckpointError, match=f"{key} must be a list of words"):
        reload(saved[1])


def test_the_anatomy_that_was_learned_with_is_kept(saved: tuple[VLM3DMultiTask, Path]) -> None:
    model, folder = saved
    model.learned_anatomy = ("classical", "phantom")
    model.save_pretrained(folder)
    assert VLM3DMultiTask.from_pretrained(folder).learned_anatomy == ("classical", "phantom")
    note = json.loads((folder / "training.json").read_text())
    del note["anatomy"]  # a checkpoint from before
    (folder / "training.json").write_text(json.dumps(note))
    assert VLM3DMultiTask.from_pretrained(folder).learned_anatomy == ()


def test_damaged_checkpoints_are_refused(saved: tuple[VLM3DMultiTask, Path]) -> None:
    folder = saved[1]
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        reload(folder)
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="damaged"):
        reload(folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["vision"]["wings"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="wings"):
        reload(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        reload(folder)


def test_saving_is_whole_or_nothing(
    saved: tuple[VLM3DMultiTask, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm3d.model.checkpoint.save_file", full_disk)
    with pytest.raises(OutputError, match="no space left"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_folder_with_other_files_is_not_overwritten(
    saved: tuple[VLM3DMultiTask, Path], tmp_path: Path
) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no checkpoint"):
        saved[0].save_pretrained(other)
    assert (other / "chapter1.txt").read_text() == "years of work"


def test_public_names_load_lazily() -> None:
    assert set(vlm3d.__all__) <= set(dir(vlm3d))
    assert vlm3d.VLM3DMultiTask is VLM3DMultiTask
    with pytest.raises(AttributeError, match="nothing"):
        _ = vlm3d.nothing
    assert load_config("tiny").name == "tiny"


def test_prompts_that_stand_still_run_no_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    model.train()
    model.classifier.soft_prompts.requires_grad_(False)
    encoder = model.classifier.text_encoder
    assert encoder is not None
    monkeypatch.setattr(encoder, "encode_with_soft_prompts", lambda *_: pytest.fail("the text encoder ran"))
    features = model.encode(torch.rand(1, 1, 16, 64, 64) * 2 - 1)
    model.classify(features)["logits"].sum().backward()
    assert model.classifier.text_projection.weight.grad is not None


def test_a_logit_is_the_documented_formula() -> None:
    model = small_model(with_text=False).eval()
    classifier = model.classifier
    torch.nn.init.normal_(classifier.prompt_embedding)
    torch.nn.init.uniform_(classifier.evidence_scale, 0.1, 2.0)
    torch.nn.init.uniform_(classifier.sharpness, 0.5, 3.0)
    torch.nn.init.normal_(classifier.bias)
    features = model.encode(torch.rand(2, 1, 16, 64, 64) * 2 - 1)
    with torch.no_grad():
        found = classifier(features)
        text = torch.nn.functional.normalize(classifier.text_projection(classifier.prompt_embedding), dim=-1)
        places = classifier.norm_image(torch.cat([features.region_BRC, features.patch_BNC], dim=1))
        whole = classifier.global_projection(classifier.norm_image(features.global_BC))
        for scan in range(2):
            for disease in range(len(text)):
                evidence = classifier.local_key(places[scan]) @ text[disease]
                attention = (classifier.sharpness[disease] * evidence).softmax(0)
                image = whole[scan] + attention @ classifier.local_value(places[scan])
                cosine = torch.nn.functional.cosine_similarity(image, text[disease], dim=0)
                expected = classifier.log_temperature.exp() * cosine + classifier.bias[disease]
                expected = expected + classifier.evidence_scale[disease] * (attention @ evidence)
                torch.testing.assert_close(found["logits_BK"][scan, disease], expected, atol=1e-4, rtol=1e-4)


def test_a_boxs_regions_are_cut_where_its_voxels_are() -> None:
    model = small_model().eval()
    pz, py, px = model.config.model.vision.patch_size
    generator = torch.Generator().manual_seed(0)
    volume = torch.rand(2, 1, 3 * pz, 3 * py, 3 * px, generator=generator) * 2 - 1
    regions = torch.randint(0, 21, (2, 3 * pz, 3 * py, 3 * px), generator=generator, dtype=torch.uint8)
    boxes = [((0, 2), (1, 3), (0, 2)), ((1, 3), (0, 2), (1, 3))]
    with torch.no_grad():
        features = model.encode(volume, regions)
        drawn = model.localize(volume, regions, features, boxes=boxes)["mask_logits"]
        for index, ((z0, z1), (y0, y1), (x0, x1)) in enumerate(boxes):
            cut = (slice(z0 * pz, z1 * pz), slice(y0 * py, y1 * py), slice(x0 * px, x1 * px))
            alone = model.localizer(
                volume[index][(slice(None), *cut)][None],
                features.within(boxes).patch_BNC[index : index + 1],
                (2, 2, 2),
                regions[index][cut][None],
            )
            assert torch.allclose(drawn[index], alone.mask_logits_BLDHW[0], atol=1e-4)
            mirrored = model.localizer(
                volume[index][(slice(None), *cut)][None],
                features.within(boxes).patch_BNC[index : index + 1],
                (2, 2, 2),
                regions[index][cut].flip(-1)[None],
            )
            assert not torch.allclose(drawn[index], mirrored.mask_logits_BLDHW[0], atol=1e-3)


# --- training and devices ------------------------------------------------------------------------------------------


def test_the_frozen_text_encoder_moves_with_the_model() -> None:
    model = small_model()
    encoder = model.classifier.text_encoder
    assert encoder is not None
    model.to("meta")
    assert encoder.device.type == "meta"


def test_a_report_without_known_findings_moves_no_norm_and_is_prompted_without_dropout() -> None:
    model = small_model().train()
    batch = make_batch(model)
    before = {name: tensor.clone() for name, tensor in model.localizer.named_buffers()}
    prompts = []
    model.report_generator.register_forward_pre_hook(
        lambda _, args, kwargs: prompts.append(kwargs["evidence"].disease_probabilities_BK), with_kwargs=True
    )
    for _ in range(2):
        model(
            ct_volume=batch["ct_volume"],
            segmentation_mask=batch["segmentation_mask"],
            report_tokens=batch["report_tokens"],
            tasks=("generation",),
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.localizer.named_buffers())
    assert torch.equal(*prompts)
    assert model.localizer.training
    assert model.classifier.training


# --- the Hub -------------------------------------------------------------------------------------------------------


class _RequestFailed(Exception):
    """What carries the requests has errors of its own."""


def test_a_checkpoint_is_put_on_the_hub_whole_or_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    put: dict[str, set[str]] = {}

    class Hub:
        def create_repo(self, name: str, **_: bool) -> None:
            if "/" not in name:
                raise _RequestFailed("no owner\nin the name")

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            put[repo_id] = {path.name for path in folder_path.iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = small_model(with_text=False)
    model.push_to_hub("me/tiny")
    assert put == {"me/tiny": {"config.json", "model.safetensors", "training.json"}}
    with pytest.raises(OutputError, match=r"tiny cannot be put on the Hub: no owner$"):
        model.push_to_hub("tiny")
