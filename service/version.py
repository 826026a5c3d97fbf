"""The installed version of Topkapi."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("topkapi")
except PackageNotFoundError:  # run from a checkout that was never installed
    VERSION = "0+checkout"
