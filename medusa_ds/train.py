"""The name that the last line of every recipe calls."""

from medusa_ds.programs.train import main as main
