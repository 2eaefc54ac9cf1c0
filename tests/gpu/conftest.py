"""What Liger patches in transformers for good ends with the test that asked for it."""

import importlib

import pytest

from medusa_ds.model.backbone import FAMILIES


@pytest.fixture(autouse=True)
def _liger_patches_end():
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in FAMILIES]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, names in zip(modules, before, strict=True):
        vars(module).update(names)
