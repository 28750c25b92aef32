"""A 3D scan, read by a 2D encoder, answered in words."""
__version__ = "0.1.0"

from importlib import import_module

from medvlm3d.base import compat

compat.install()

PUBLIC = {
    "fetch": "base.fetch",
    "read_volume": "scans.readers",
    "Volume": "scans.volume",
    "Preprocess": "scans.prepare",
    "load_encoder": "method.encoders",
    "select_slices": "method.selection",
    "SpatialFrequencyFusion": "method.fusion",
    "FineGrainedInjection": "method.injection",
    "MedVLM3DConfig": "method.connector",
    "MedVLM3DProcessor": "method.language",
    "MedVLM3D": "method.model",
    "tiny": "method.model",
    "demo": "method.model",
    "paper": "method.model",
}


def __getattr__(name):
    "A public name, imported from its module when it is first used: a bare import stays cheap."
    if name not in PUBLIC:
        raise AttributeError(f"module 'medvlm3d' has no attribute {name!r}")
    return getattr(import_module(f"medvlm3d.{PUBLIC[name]}"), name)


def __dir__():
    return sorted({*globals(), *PUBLIC})
