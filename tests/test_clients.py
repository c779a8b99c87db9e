"""Programs of others that run models: timm's scripts, trainers, adapters, pipelines."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

import tome_fx
from tests.palette import compiled, distance, equalize, palette_image
from tests.test_training import assert_same

R, SIZE, PATCH, KINDS = 6, 64, 8, 3
TOKENS = [(65, 59), (59, 53)]
"""Of a merge after each block but the last, whose patches nobody reads."""


def vit(**options: Any) -> ViTForImageClassification:
    """65 tokens, three blocks, random weights; positions are zero and stay so, so that equal patches are equal."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(image_size=SIZE, patch_size=PATCH, num_labels=KINDS, **sizes, **options)
    model = equalize(ViTForImageClassification(config), seed=1)
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    return model


def backend(r: Any = R, **options: Any) -> Any:
    return tome_fx.tome_backend(**{"r": r, "inner": "eager", "placement": "stream", **options})


def data(count: int = 8) -> list[dict[str, Any]]:
    images = palette_image(count, SIZE, PATCH, k=3)
    return [{"pixel_values": image, "labels": i % KINDS} for i, image in enumerate(images)]


def merges() -> list[list[tuple[int, int]]]:
    """The merges of each graph that had any since the test began."""
    return [report.tokens for report in tome_fx.reports() if report.merged_sites]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moves(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far training moved each weight."""
    return {name: value - before[name] for name, value in weights(model).items()}


# -- trainers ----------------------------------------------------------------------------------------------------------


def trained_by_trainer(model: nn.Module, folder: Path, **arguments: Any) -> list[float]:
    """The losses of three steps with gradient checkpointing."""
    from transformers import Trainer, TrainingArguments

    said = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model=model, args=said, train_dataset=data())
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_transformers_trainer(tmp_path: Path) -> None:
    """Equal tokens merge, so three steps move every weight as they do unmerged."""
    pytest.importorskip("accelerate")
    want, before = vit(), weights(vit())
    wanted = trained_by_trainer(want, tmp_path)
    model = vit()
    model.forward = torch.compile(model.forward, backend=backend())
    found = trained_by_trainer(model, tmp_path)
    assert merges() and all(tokens == TOKENS for tokens in merges())
    assert found == pytest.approx(wanted, rel=1e-5) and math.isfinite(sum(found))
    assert_same(moves(model, before), moves(want, before), 1e-4)
    assert_all_move(model, before)


def assert_all_move(model: nn.Module, before: dict[str, Tensor]) -> None:
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    still = {name for name in trained if not moves(model, before)[name].any()}
    assert trained and not still


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    moved = []
    for r in (None, R):
        accelerate.state.AcceleratorState._reset_state(True)  # one process, one precision otherwise
        model = vit()
        model.gradient_checkpointing_enable()
        model.train()
        if r is not None:
            model.forward = torch.compile(model.forward, backend=backend(r))
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        loader = DataLoader(data(), batch_size=4)  # type: ignore[arg-type]
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        before = weights(model)
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss)
            optimizer.step()
        assert_all_move(model, before)
        moved.append(moves(model, before))
    assert merges() and all(tokens == TOKENS for tokens in merges())
    assert_same(moved[1], moved[0], 1e-4 if precision == "no" else 0.05)


def test_names_outside_of_a_closed_list(tmp_path: Path) -> None:
    """Both take names of a list of their own alone; where they take ours, docs/programs.md has less to say."""
    accelerate = pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    accelerate.state.AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="TOME_R8"):
        accelerate.Accelerator(cpu=True, dynamo_backend="tome_r8")
    said = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], torch_compile_backend="tome_r8")
    with pytest.raises(ValueError, match="TOME_R8"):
        Trainer(model=vit(), args=said)


def test_adapters() -> None:
    """LoRA around the projections of a frozen model: gradients of the adapters are those of the unmerged model."""
    peft = pytest.importorskip("peft")
    grads = []
    for r in (None, R):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        model = peft.get_peft_model(vit(), config).train()
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide lora_A
                nn.init.normal_(p, std=0.1)
        fast = model if r is None else compiled(model, r, placement="stream")
        fast(**next(iter(DataLoader(data(), batch_size=8)))).loss.backward()  # type: ignore[arg-type]
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert merges() == [TOKENS]
    assert sum("lora_" in name for name in grads[1]) == 2 * 2 * 3
    assert_same(grads[1], grads[0], 2e-5)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = vit()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

    moved = []
    for r in (None, R):
        module = Module()
        before = weights(module)
        if r is not None:
            module.model.forward = torch.compile(module.model.forward, backend=backend(r))
        trainer = lightning.Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data(), batch_size=4))  # type: ignore[arg-type]
        moved.append(moves(module, before))
        assert_all_move(module, before)
    assert merges() and all(tokens == TOKENS for tokens in merges())
    assert_same(moved[1], moved[0], 1e-4)


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_pipeline() -> None:
    """Equal tokens merge, so the scores are those of the plain pipeline."""
    from transformers import ViTImageProcessor, pipeline

    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    images = [to_image(row["pixel_values"]) for row in data(3)]
    found = []
    for r in (None, R):
        model = vit()
        if r is not None:
            model.forward = torch.compile(model.forward, backend=backend(r))
        found.append(pipeline("image-classification", model=model, image_processor=processor)(images))
    assert merges() == [TOKENS]
    scores = [torch.tensor([[one["score"] for one in sorted(image, key=str)] for image in each]) for each in found]
    assert distance(scores[1], scores[0]) < 2e-5


def to_image(pixels: Tensor) -> Image.Image:
    """A palette stays one: every patch becomes the same bytes wherever it stands."""
    return Image.fromarray((pixels.permute(1, 2, 0) * 64 + 128).clamp(0, 255).to(torch.uint8).numpy())
