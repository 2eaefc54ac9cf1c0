"""TensorRT-LLM reads the file of TGI, always with a projection a head, where there is no `medusa_lm_head.pt`."""

from pathlib import Path

from medusa_ds.exporting.source import Source
from medusa_ds.exporting.tgi import write_heads


def refuses(source: Source, allow_loss: bool) -> str | None:
    """Why it does not run these heads."""
    return source.beyond("medusa")


def write(source: Source, directory: Path) -> None:
    """Write what it reads."""
    write_heads(source, directory, copies=True)


def code(source: Source, out: str, base: str) -> str:
    """How it is used."""
    sizes = f"--num_medusa_heads {source.meta['num']} --num_medusa_layers {source.meta['layers']}"
    return (
        f"```bash\npython examples/medusa/convert_checkpoint.py --model_dir {base} --medusa_model_dir {out} "
        f"{sizes} --output_dir CHECKPOINT\n```"
    )
