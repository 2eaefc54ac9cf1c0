"""Packaging. Recipes and DeepSpeed configs live at the top of the repository and travel inside the wheel."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="medusa-ds",
    version="0.1.0",
    description="Medusa heads trained with DeepSpeed ZeRO and Liger's fused linear cross-entropy",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["medusa_ds", "medusa_ds.*"]),
        "medusa_ds.recipes",
        "medusa_ds.ds_configs",
        "medusa_vllm",
    ],
    package_dir={
        "medusa_ds": "medusa_ds",
        "medusa_ds.recipes": "recipes",
        "medusa_ds.ds_configs": "ds_configs",
        "medusa_vllm": "plugins/vllm/medusa_vllm",
    },
    package_data={
        "medusa_ds": ["pretrained/*/*"],
        "medusa_ds.config": ["shapes.json"],
        "medusa_ds.data": ["sample/*", "openings.txt"],
        "medusa_ds.recipes": ["*.yaml"],
        "medusa_ds.ds_configs": ["*.json"],
    },
    # .ci/run tests the newest versions, and each of these lower bounds in a second environment
    install_requires=[
        "torch>=2.8",
        "transformers>=5.17",
        "deepspeed>=0.19.8",
        "liger-kernel>=0.8.5,<0.9",
        "triton>=3.4",
        "accelerate>=1.10",  # transformers places weights with it
        "gguf>=0.17",  # transformers reads GGUF files with it
        "tokenizers>=0.23.3",
        "safetensors>=0.8",
        "huggingface_hub>=1.33",
        "datasets>=4.5",
        "pyarrow>=21.0",
        "numpy>=2.0",
        "jinja2>=3.1.4",
        "pydantic>=2.12",
        "pyyaml>=6.0.2",
        "matplotlib>=3.10",
        "tqdm>=4.67",
        "filelock>=3.16",
        "psutil>=6.0",
    ],
    extras_require={
        "distill": ["openai>=2.0"],
        "test": [
            "pytest",
            "pytest-xdist",
            "openai>=2.0",
            "hypothesis",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "types-PyYAML",
            "tensorboard",
        ],
    },
    entry_points={
        "console_scripts": ["medusa-ds=medusa_ds.cli:main"],
        "vllm.general_plugins": ["medusa=medusa_vllm:register"],
    },
)
