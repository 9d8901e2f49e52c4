__version__ = "0.1.0"

from . import _moved  # noqa: E402,F401 (names of before 0.2)
