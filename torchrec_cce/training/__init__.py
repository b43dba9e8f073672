"""Runs: a model trained on a log as a configuration says, in one process or on several ranks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
