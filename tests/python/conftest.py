"""What the tests of the Python API share with those of training."""

from tests.training.conftest import reports_have_blank_pictures

__all__ = ["reports_have_blank_pictures"]
