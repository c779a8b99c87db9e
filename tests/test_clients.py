"""Programs of others that run models: timm's scripts, trainers, adapters, pipelines."""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

import tome_fx
from tests.palette import compiled, distance, equalize, palette_image, said
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
    """Equal tokens merge, so the scores are those of the plain pipeline; without sizes they are not."""
    from transformers import ViTImageProcessor, pipeline

    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    images = [to_image(row["pixel_values"]) for row in data(3)]
    found = []
    for how in (None, backend(), backend(prop_attn=False)):
        model = vit()
        if how is not None:
            model.forward = torch.compile(model.forward, backend=how)
        found.append(pipeline("image-classification", model=model, image_processor=processor)(images))
    assert merges() == [TOKENS] * 2
    scores = [torch.tensor([[one["score"] for one in sorted(image, key=str)] for image in each]) for each in found]
    assert distance(scores[1], scores[0]) < 2e-5 < 1e-4 < distance(scores[2], scores[0])


def to_image(pixels: Tensor) -> Image.Image:
    """A palette stays one: every patch becomes the same bytes wherever it stands."""
    return Image.fromarray((pixels.permute(1, 2, 0) * 64 + 128).clamp(0, 255).to(torch.uint8).numpy())


def test_weights_of_attention() -> None:
    """Fused attention gives none, and the line that says so breaks every block: the message shows it. Under eager
    attention they come back with a row and a column for each token."""
    model, x = vit(), palette_image(2, SIZE, PATCH, k=3)
    fast = torch.compile(model, backend=backend())
    with torch.no_grad(), pytest.warns(tome_fx.ToMeWarning, match="set your attention to `eager`") as told:
        fast(x, output_attentions=True)
    assert len(said(told)) == 1 and not merges()
    model.set_attn_implementation("eager")
    torch._dynamo.reset()  # it skips what it gave up until then
    with torch.no_grad():
        want = model(x, output_attentions=True)
        got = fast(x, output_attentions=True)
    assert merges() == [TOKENS]
    assert distance(got.logits, want.logits) < 2e-5
    assert [weights.shape for weights in got.attentions] == [weights.shape for weights in want.attentions]


# -- timm --------------------------------------------------------------------------------------------------------------


def test_naflex_with_padding() -> None:
    """timm keeps the compiler out of one of its position embeddings, and then nobody knows the mask."""
    made = {
        grid: timm.create_model("naflexvit_base_patch16_gap", embed_dim=64, depth=2, num_heads=4,
                                pos_embed_use_grid_sample=grid).eval()
        for grid in (False, True)
    }  # fmt: skip
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    valid = torch.arange(64) < torch.tensor([[64], [48]])
    x = {"patches": torch.randn(2, 64, 768), "patch_coord": places.expand(2, -1, -1), "patch_valid": valid}
    with torch.no_grad(), pytest.warns(tome_fx.ToMeWarning) as told:
        compiled(made[False], R, placement="stream")(x)
    (message,) = said(told)
    assert "pos_embed" in message and "mask" in message and not merges()
    with torch.no_grad():
        compiled(made[True], R, placement="stream")(x)
    assert len(merges()) == 1 and tome_fx.reports()[-1].merged_sites == 2

TIMM = {"model_name": "vit_tiny_patch16_224", "num_classes": KINDS}
SMALL = ["--model", "vit_tiny_patch16_224", "--num-classes", str(KINDS), "--model-kwargs", "depth=2", "--device", "cpu"]
MERGED = re.compile(r"[12] of 2 attention sites merged in 1 graph: 197 -> (\d+) tokens")


@pytest.mark.slow
def test_timm_task() -> None:
    """What timm's train.py trains with, by name, with averaged weights and gradient checkpointing: weights move and
    evaluate as uncompiled, as equal patches merge."""
    task_of = pytest.importorskip("timm.task").ClassificationTask
    images, labels, found = palette_image(4, 224, 16, k=3), torch.tensor([0, 1, 2, 0]), []
    options = {"options": {"tome.inner": "eager", "tome.placement": "stream"}}
    for name in (None, "tome_r16"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = equalize(timm.create_model(**TIMM, depth=2), seed=1).train()
        model.pos_embed.requires_grad_(False)
        model.set_grad_checkpointing()
        task = task_of(model, device=torch.device("cpu"), verbose=False)
        task.setup_ema(decay=0.5)
        if name:
            task.compile(backend=name, **options)
            task.compile_ema(backend=name, **options)
        optimizer, before = torch.optim.SGD(model.parameters(), 0.05), weights(model)
        for step in range(2):
            optimizer.zero_grad()
            task(images, labels)["loss"].backward()
            optimizer.step()
            task.update_ema(step=step)
        assert_all_move(model, before)
        with torch.inference_mode():
            task.eval()
            outputs = [task.get_eval_model(ema=ema)(images).clone() for ema in (False, True)]
        found.append((moves(model, before), outputs))
    assert len(merges()) == 3 and all(tokens[0] == (197, 181) for tokens in merges())
    assert_same(found[1][0], found[0][0], 1e-4)
    assert distance(found[1][1], found[0][1]) < 1e-4


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's programs, which none of its packages holds: a checkout of its release, or of TIMM_SOURCE."""
    if said := os.environ.get("TIMM_SOURCE"):
        return Path(said)
    folder = tmp_path_factory.mktemp("timm") / "source"
    page = "https://github.com/huggingface/pytorch-image-models"
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{timm.__version__}", page, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no git: {error}")
    if done.returncode:
        pytest.skip(f"no checkout of timm, and TIMM_SOURCE names none: {done.stderr.strip()}")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as timm reads it, train and validation, four images of each class: palettes of the size of the model."""
    folder = tmp_path_factory.mktemp("images")
    pictures = palette_image(4 * KINDS, 224, 16, k=3)
    for split in ("train", "validation"):
        for i, picture in enumerate(pictures):
            path = folder / split / str(i % KINDS) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_image(picture).save(path)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(equalize(timm.create_model(**TIMM, depth=2), seed=1).state_dict(), path)
    return path


def run(script: Path, *arguments: str) -> str:
    """What a program says, its reports of merging with it."""
    if not script.exists():
        pytest.skip(f"{script.name} is not in this checkout")
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "TORCH_LOGS": "+tome_fx", "PYTHONPATH": os.pathsep.join([root, str(script.parent)])}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_timm_benchmark(scripts: Path, tmp_path: Path) -> None:
    brief = ["--num-warm-iter", "1", "--num-bench-iter", "5", "-b", "2", "--results-file", str(tmp_path / "out.csv")]
    said = run(scripts / "benchmark.py", *SMALL, *brief, "--torchcompile", "tome_r16")
    assert len(MERGED.findall(said)) == 2  # inference, training
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    assert float(row["infer_samples_per_sec"]) > 0 and float(row["train_samples_per_sec"]) > 0


@pytest.mark.slow
def test_timm_validate(scripts: Path, images: Path, checkpoint: Path) -> None:
    """Equal patches merge: the loss that it prints is that of the plain model, to its four digits."""
    rest = ["--checkpoint", str(checkpoint), "-b", "4", "-j", "1", "--crop-pct", "1.0", "--log-freq", "1"]
    plain, merged = (
        run(scripts / "validate.py", str(images), *SMALL, *rest, *more) for more in ([], ["--torchcompile", "tome_r16"])
    )
    losses = [re.findall(r"Loss: +([\d.]+)", said) for said in (plain, merged)]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    assert MERGED.findall(merged) and not MERGED.findall(plain)


@pytest.mark.slow
def test_timm_train(scripts: Path, images: Path, checkpoint: Path, tmp_path: Path) -> None:
    """An epoch with averaged weights and gradient checkpointing; the checkpoint has the plain model's names."""
    rest = ["-b", "4", "-j", "0", "--opt", "sgd", "--lr", "0.01", "--epochs", "1", "--warmup-epochs", "0"]
    place = ["--output", str(tmp_path), "--experiment", "run", "--initial-checkpoint", str(checkpoint)]
    more = ["--model-ema", "--grad-checkpointing", "--torchcompile", "tome_r16"]
    said = run(scripts / "train.py", str(images), *SMALL, *rest, *place, *more)
    assert len(MERGED.findall(said)) >= 2  # training, validation
    (row,) = csv.DictReader((tmp_path / "run" / "summary.csv").open())
    assert math.isfinite(float(row["train_loss"])) and math.isfinite(float(row["eval_loss"]))
    saved = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)
    timm.create_model(**TIMM, depth=2).load_state_dict(saved["state_dict"])
