"""Train the small ViT that the package ships, on procedural scenes.

    python scripts/train_testbed.py --steps 3500 --compile --output_dir round_1
    python scripts/train_testbed.py --steps 2000 --compile --seed 1 --learning_rate 6e-4 --warmup_steps 100 \
        --start_from round_1 --output_dir round_2
    python scripts/train_testbed.py --steps 2400 --compile --seed 2 --learning_rate 5e-4 --warmup_steps 100 \
        --start_from round_2 --output_dir round_3 --vary_photographs
    python scripts/train_testbed.py --steps 2000 --compile --seed 3 --learning_rate 3e-4 --warmup_steps 50 \
        --start_from round_3 --vary_photographs

The shipped weights came of these four rounds, on 2 CPU cores. The result (config, image processor, float16
safetensors, results.json with the accuracy on held-out scenes) is what ``register_adapter.testbed.load_vit()`` loads.
Held out means: other seeds and other photographs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from register_adapter.testbed import LABELS, Scene, SceneDataset

HELD_OUT_SEED = 10_000


def build_model() -> transformers.ViTForImageClassification:
    """1.6 M parameters: width 128, 8 blocks, 80 px, patch 8 (100 patches)."""
    config = transformers.ViTConfig(
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=80,
        patch_size=8,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    return transformers.ViTForImageClassification(config)


def collate(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels scaled to -1…1 as the shipped image processor does it, labels (B,), and patch labels (B, 100).

    A patch that is more than half main shape has the scene's label, every other patch the label ``len(LABELS)``.
    """
    pixels = np.stack([scene.image for scene in scenes])
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.tensor([scene.label for scene in scenes])
    masks = torch.from_numpy(np.stack([scene.mask for scene in scenes])).float()
    covered = torch.nn.functional.avg_pool2d(masks[:, None], 8).flatten(1) > 0.5
    return scaled, labels, torch.where(covered, labels[:, None], len(LABELS))


def variants(photo: Image.Image) -> list[Image.Image]:
    """A photograph in its own and in other colours and turns: nine images are few to learn backgrounds from."""
    turned = [photo, ImageOps.mirror(photo), ImageOps.flip(photo), photo.transpose(Image.Transpose.TRANSPOSE)]
    swapped = [Image.merge("RGB", [photo.getchannel(c) for c in order]) for order in ("GRB", "BGR", "RBG", "GBR")]
    return [*turned, *swapped, ImageOps.grayscale(photo).convert("RGB"), ImageOps.invert(photo)]


class Scenes(SceneDataset):
    """Whole scenes, masks included, instead of the image folder's columns; ``varied`` multiplies the photographs."""

    def __init__(self, length: int, *, varied: bool = False, **kwargs: Any) -> None:
        super().__init__(length, **kwargs)
        if varied:
            self._photos = tuple(variant for photo in self._photos for variant in variants(photo))

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]
        return self.scene(index)


@torch.no_grad()
def accuracy(model: torch.nn.Module, scenes: int, batch_size: int, split: str = "test") -> float:
    """Top-1 accuracy on held-out scenes; ``split="train"`` has the photographs of the training scenes behind them."""
    model.eval()
    loader = DataLoader(Scenes(scenes, seed=HELD_OUT_SEED, split=split), batch_size, collate_fn=collate)
    hits = sum(int((model(x).logits.argmax(-1) == y).sum()) for x, y, _ in loader)
    model.train()
    return hits / scenes


def save(model: transformers.ViTForImageClassification, folder: Path) -> None:
    """Write config, processor settings and float16 weights."""
    half = build_model().half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    size = {"height": 80, "width": 80}
    transformers.ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("register_adapter/testbed/weights"))
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--warmup_steps", type=int, default=300)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--evaluate_every", type=int, default=500)
    parser.add_argument("--patch_loss", type=float, default=1.0, help="weight of the patch labels' cross-entropy")
    parser.add_argument("--compile", action="store_true", help="torch.compile the forward pass")
    parser.add_argument("--vary_photographs", action="store_true", help="train on them in ten variants each")
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start_from", type=Path, help="folder of an earlier round, to go on from its weights")
    args = parser.parse_args()

    transformers.set_seed(args.seed)
    accelerator = accelerate.Accelerator(mixed_precision=args.mixed_precision)
    model, rounds = build_model(), []
    if args.start_from:
        model = transformers.ViTForImageClassification.from_pretrained(args.start_from, dtype=torch.float32).train()
        rounds = json.loads((args.start_from / "results.json").read_text())["rounds"]
    # Patch tokens name the shape they lie on: a dense target, dropped after training, that halves the steps needed.
    patch_head = torch.nn.Linear(model.config.hidden_size, len(LABELS) + 1)
    parameters = [*model.parameters(), *patch_head.parameters()]
    decay = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.steps)
    data = Scenes(args.steps * args.batch_size, seed=args.seed, varied=args.vary_photographs)
    loader = DataLoader(data, args.batch_size, collate_fn=collate, num_workers=args.num_workers)
    model, patch_head, optimizer, loader, scheduler = accelerator.prepare(
        model, patch_head, optimizer, loader, scheduler
    )
    forward = torch.compile(model) if args.compile else model

    began = time.time()
    history = []
    for step, (pixels, labels, patch_labels) in enumerate(tqdm(loader, mininterval=30), 1):
        output = forward(pixel_values=pixels, labels=labels, output_hidden_states=True)
        patches = patch_head(output.hidden_states[-1][:, 1:])
        dense = torch.nn.functional.cross_entropy(patches.flatten(0, 1), patch_labels.flatten())
        loss = output.loss + args.patch_loss * dense
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % args.evaluate_every == 0 or step == args.steps:
            correct = accuracy(model, 1000, args.batch_size)
            history.append({"step": step, "loss": output.loss.item(), "patch_loss": dense.item(), "accuracy": correct})
            print(history[-1], flush=True)
            save(accelerator.unwrap_model(model), args.output_dir)

    shipped = transformers.ViTForImageClassification.from_pretrained(args.output_dir, dtype=torch.float32)
    results = {
        "accuracy": accuracy(shipped, 5000, args.batch_size),
        "held_out_scenes": 5000,
        "accuracy_same_photographs": accuracy(shipped, 2000, args.batch_size, "train"),
        "held_out_seed": HELD_OUT_SEED,
        "classes": len(LABELS),
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "rounds": [
            *rounds,
            {
                "hours": round((time.time() - began) / 3600, 3),
                "arguments": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
                "history": history,
            },
        ],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"accuracy on held-out scenes: {results['accuracy']:.4f}")


if __name__ == "__main__":
    main()
