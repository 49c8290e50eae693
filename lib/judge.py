"""The judge by the name that scripts outside this repository import."""
from lib.metrics.judge import JudgeExtractor  # noqa: F401
