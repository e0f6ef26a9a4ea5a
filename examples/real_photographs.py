"""Write an image folder of real photographs: crops of the images that scikit-image and scikit-learn carry.

    python examples/real_photographs.py photos --size 96 --crops 40 --bad

``photos/train`` and ``photos/validation`` have one sub-folder a photograph. A photograph's left three quarters give its
training crops and the rest its validation crops, so the two share no pixel. ``--bad`` adds what such folders have in
practice: grey, CMYK, RGBA, 16-bit and animated images, which are read, and broken ones, which are not.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
}
#: Files of write_awkward that cannot be read.
BROKEN = ("corrupt.png", "empty.jpg", "notes.jpg", "readme.txt", "truncated.jpg")


def photograph(name: str) -> Image.Image:
    package, file = PHOTOGRAPHS[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: pip install scikit-image scikit-learn")
    with Image.open(Path(spec.origin).parent / file) as image:
        return image.convert("RGB")


def positive(word: str) -> int:
    """A whole number of 1 or more; argparse says it in one line."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def write_crops(folder: Path, size: int, crops: int, names: list[str]) -> None:
    """``crops`` random squares of each photograph for training, a quarter as many for validation."""
    rng = np.random.default_rng(0)
    for name in names:
        image = photograph(name)
        border = image.width * 3 // 4
        for split, left, right, count in (
            ("train", 0, border, crops),
            ("validation", border, image.width, max(1, crops // 4)),
        ):
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            side = min(size, right - left, image.height)
            for index in range(count):
                x, y = rng.integers(left, right - side + 1), rng.integers(0, image.height - side + 1)
                image.crop((x, y, x + side, y + side)).save(target / f"{index:03d}.jpg", quality=95)


def write_awkward(folder: Path, image: Image.Image) -> None:
    """Files of every kind that a folder of photographs may hold; those of ``BROKEN`` cannot be read."""
    grey = image.convert("L")
    grey.save(folder / "grey.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    see_through = image.copy()
    see_through.putalpha(grey)
    see_through.save(folder / "rgba.png")
    image.quantize(32).save(folder / "palette.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "sixteen_bit.png")
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    image.save(folder / "truncated.jpg")
    whole = (folder / "truncated.jpg").read_bytes()
    start = whole.rindex(b"\xff\xda")  # where the pixels begin
    (folder / "truncated.jpg").write_bytes(whole[: (start + len(whole)) // 2])
    image.save(folder / "corrupt.png")
    pixels = bytearray((folder / "corrupt.png").read_bytes())
    start = pixels.index(b"IDAT") + 4  # zeros further on may be decoded, as other pixels
    pixels[start : start + 20] = bytes(20)
    (folder / "corrupt.png").write_bytes(pixels)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.jpg").write_text("This is text with the name of an image.\n", "utf-8")
    (folder / "readme.txt").write_text("Photographs of one class.\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=positive, default=96, help="side of a crop in pixels")
    parser.add_argument("--crops", type=positive, default=40, help="training crops a photograph")
    parser.add_argument("--classes", nargs="+", default=list(PHOTOGRAPHS), choices=list(PHOTOGRAPHS))
    parser.add_argument("--bad", action="store_true", help="add awkward and broken files to the first class")
    args = parser.parse_args()
    try:
        write_crops(args.folder, args.size, args.crops, args.classes)
        if args.bad:
            name = args.classes[0]
            write_awkward(args.folder / "train" / name, photograph(name).crop((0, 0, args.size, args.size)))
    except OSError as error:
        raise SystemExit(f"cannot write to {args.folder}: {error}") from None
    print(f"wrote {sum(path.is_file() for path in args.folder.rglob('*'))} files to {args.folder}")


if __name__ == "__main__":
    main()
