"""Found by Python at its start through PYTHONPATH: the product carries no hooks for tests."""

import os

if "FAULT" in os.environ:
    import file_faults

    file_faults.install_from_environment()
